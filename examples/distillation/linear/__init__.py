"""How many images a linear model needs: the bound and what is learned."""
