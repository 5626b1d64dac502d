"""What is kept on disk: model files, the state of a site, the folder of a run."""
