"""Post-training of language models on PyTorch Lightning: from SFT to RL with verifiable rewards, from one YAML."""
