"""A trained model on new images: whatever the file format, the result lies exactly on the image."""
