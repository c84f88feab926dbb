"""What is in the activations of a data set: probes, components, exemplars, decision layers."""
