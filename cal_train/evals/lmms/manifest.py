"""What lmms-eval finds through the entry point ``lmms_eval.models``."""

from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "cal_train"


def manifests() -> list[ModelManifest]:
    """Return our model's name and class; the class is imported when the model is asked for."""
    return [ModelManifest(model_id=MODEL_ID, simple_class_path="cal_train.evals.lmms.plugin.CalTrain")]
