"""trainless: patch pretrained models at load time, with no training."""
