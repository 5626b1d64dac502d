"""Where MONAI Label looks for its app."""

from front.app import SiteApp

__all__ = ["SiteApp"]
