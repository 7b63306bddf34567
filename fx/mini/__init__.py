"""How the shipped mini models were made: corpus, then mini-vae, mini-clip, mini-sscd and mini-sd (notebook 00)."""
