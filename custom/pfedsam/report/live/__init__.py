"""The page about a run that still goes on; `pfedsam.report.page` is the one about a run that is finished."""
