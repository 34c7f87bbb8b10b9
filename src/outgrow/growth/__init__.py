"""Growth as data: a plan says which new tensor comes from which old one; operators write plans; laws check them."""
