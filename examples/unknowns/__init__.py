"""What the study of unknown inputs trains, asks and judges."""
