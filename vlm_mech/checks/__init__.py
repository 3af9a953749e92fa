"""Does each name mean what it says in a loaded model?"""
