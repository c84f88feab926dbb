"""The logit lens: what every place in a tower would answer."""
