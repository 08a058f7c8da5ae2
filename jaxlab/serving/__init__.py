"""``jaxlab serve``: an engine behind HTTP, for clients of the OpenAI protocol and for people."""
