"""The viewer: a page on this machine's loopback that shows an image, its truth and what the models find in it."""
