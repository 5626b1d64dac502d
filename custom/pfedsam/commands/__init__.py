"""The commands of `pfedsam`, one subject a file. Heavy libraries are imported inside the commands that need them."""
