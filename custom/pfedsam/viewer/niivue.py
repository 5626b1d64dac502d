"""NiiVue (BSD-2-Clause), which draws the images in the page. It comes with the package ipyniivue, extra `viewer`.

That package holds NiiVue as one JavaScript module without any address outside, made for notebooks: it exports its
widget and not NiiVue itself. The module is served as it is, with a last line that exports the class `Niivue` too.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
from pathlib import Path

from pfedsam.errors import ErrorCode, PFedSAMError

PACKAGE, VERSION = "ipyniivue", "2.4.4"
#: SHA-256 of the module in this version of the package: another one has not been looked at.
SHA256 = "922951141f03da6294cc74a7c520d694a9723733ee25d997b85da8136057a96b"
#: Where the widget makes its NiiVue: the third name is that of the class.
_MADE = re.compile(
    r'Creating new Niivue instance"\);let ([\w$]+)=[\w$]+\.get\("opts"\)\?\?\{\},([\w$]+)=[\w$]+\(\1\);[\w$]+='
    r"new ([\w$]+)\(\2\)"
)
_REMEDY = "Install it with the extra: pip install 'pfedsam[viewer]'."


def niivue_module() -> bytes:
    """NiiVue as an ES module that exports `Niivue`. The package's Python code is not imported.

    Raises:
        PFedSAMError: E31 if the package is not installed, or is not the version that this viewer knows.
    """
    # a package of one level: nothing of it is executed to find it
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise PFedSAMError(ErrorCode.MISSING_LIBRARY, f"the viewer needs {PACKAGE}, which holds NiiVue.", _REMEDY)
    path = Path(found.origin).parent / "static" / "widget.js"
    content = path.read_bytes() if path.is_file() else b""
    made = _MADE.search(content.decode(errors="replace"))
    if made is None or hashlib.sha256(content).hexdigest() != SHA256:
        message = f"{path} of {PACKAGE} {_version()} is not that of {VERSION}, which the viewer was made for."
        raise PFedSAMError(ErrorCode.MISSING_LIBRARY, message, _REMEDY)
    return content + f"\nexport{{{made.group(3)} as Niivue}};\n".encode()


def _version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "(of an unknown version)"
