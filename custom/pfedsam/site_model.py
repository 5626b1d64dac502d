"""`pfedsam.storage.site_model` by the name that bundles import.

It stays: users' own bundles name it, and the hash of a bundle's configuration, which every record holds, is made with
it.
"""

from pfedsam.storage.site_model import SiteModel, read, save_alone, write

__all__ = ["SiteModel", "read", "save_alone", "write"]
