"""From prompts to clips: latents, pixels, files."""
