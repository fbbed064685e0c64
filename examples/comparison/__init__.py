"""Train a ResNet with each classifier head under otherwise equal conditions, and compare what comes out."""
