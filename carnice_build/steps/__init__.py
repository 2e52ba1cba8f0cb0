"""Steps of recipes, one file each: they rewire a view of tensors and move no byte."""
