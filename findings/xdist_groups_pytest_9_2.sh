#!/usr/bin/env bash
# pytest 9.2.0 with pytest-xdist 3.8.0, each the newest: `--dist loadgroup` runs, says nothing, and keeps no group together.
#
# Guess before: the tests of an `xdist_group` go to one worker, so a fixture of their module or session is made once.
# Seen: they are dealt out one by one, as with `--dist load`: both workers make the fixture. xdist writes the group's name
# behind the id of a test, into an attribute that pytest 9.2 does not read any more; with pytest 9.1.1 the group holds.
# A suite whose fixtures are expensive takes up to twice as long, and passes.
#
# Guard: tests/conftest.py gives the scheduler of `--dist loadfile`, which goes by the name of the file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/test_group.py" <<'END'
import pathlib
import time

import pytest


@pytest.fixture(scope="module")
def made(worker_id):
    pathlib.Path(f"made-{worker_id}").write_text("")


@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("number", range(8))
def test_together(made, number):
    time.sleep(0.2)
END
workers() {
    "$folder/venv/bin/pip" install --quiet "pytest==$1" pytest-xdist==3.8.0 2>/dev/null
    rm -f "$folder"/made-*
    (cd "$folder" && venv/bin/python -m pytest -q -n 2 --dist loadgroup test_group.py >/dev/null)
    find "$folder" -maxdepth 1 -name 'made-*' | wc -l
}
before=$(workers 9.1.1)
now=$(workers 9.2.0)
echo "workers that made the fixture of one group: pytest 9.1.1: $before, pytest 9.2.0: $now"
test "$before" -eq 1 && test "$now" -eq 2
