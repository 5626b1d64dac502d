"""pFedSAM: personalised federated fine-tuning of the Segment Anything Model for medical image segmentation."""

__version__ = "0.1.0"
