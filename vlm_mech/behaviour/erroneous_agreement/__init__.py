"""Images that are alike to a contrastive model: who tells them apart?"""
