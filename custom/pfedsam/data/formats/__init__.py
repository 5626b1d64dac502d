"""How each format is read; `pfedsam.data.reader.load_picture` chooses among them."""
