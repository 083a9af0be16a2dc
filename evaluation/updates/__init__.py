"""What fine-tuning did to the weights: spectra, cut updates, reachability of a token."""
