"""What `pipelines.compare` is made of: runs read from MLflow → groups of seeds → a verdict → one page."""
