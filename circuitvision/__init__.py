"""Mechanistic circuit analysis of vision, vision-language and vision-language-action models."""
