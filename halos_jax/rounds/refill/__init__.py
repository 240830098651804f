"""Further prompts for a round whose samples tie too often to give it enough to train on."""
