"""Images and labels learned in closed form: kernel inducing points."""
