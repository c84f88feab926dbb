"""Which pixels, patches and words the output depends on, and whether a map of them tells the truth."""
