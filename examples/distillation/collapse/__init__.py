"""Neural collapse of networks trained on distilled and on real images."""
