"""`pfedsam.storage.site_model` by the name that bundles import, and what else of `storage` they call.

It stays: users' own bundles name it, and the hash of a bundle's configuration, which every record holds, is made with
it.
"""

from pfedsam.storage.bundle_weights import default_model, load_model
from pfedsam.storage.site_model import SiteModel, read, save_alone, write

__all__ = ["SiteModel", "default_model", "load_model", "read", "save_alone", "write"]
