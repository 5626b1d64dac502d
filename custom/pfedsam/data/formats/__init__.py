"""How each format is read; `pfedsam.data.pictures.load_picture` chooses among them."""
