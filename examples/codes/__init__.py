"""What the study of many classes trains."""
