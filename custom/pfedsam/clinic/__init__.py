"""A site's model in 3D Slicer, through MONAI Label: its server is the front, this package has the model."""
