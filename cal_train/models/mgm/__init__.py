"""MGM and MGM-HD as transformers classes; `cal_train.models.mgm_family` holds what a training step needs of them.

Each module registers its class with the Auto class that it belongs to.
"""
