"""What a person has to what a person wants, where transformers has no pipeline of its own."""
