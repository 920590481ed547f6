"""A zoo of defences and honest networks, each with its own adaptive attack: does `ducat.evaluate` tell the truth?"""
