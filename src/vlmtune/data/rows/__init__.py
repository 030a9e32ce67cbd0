"""Where rows lie and what they say: files, tables, archives and lists of them, formats, media paths."""
