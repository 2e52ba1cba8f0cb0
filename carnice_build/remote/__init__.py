"""The same store somewhere else: objects behind a URL, believed by digest and by signature."""
