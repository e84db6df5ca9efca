"""Labels + point-in-time join -> split -> tune -> fit -> evaluate -> register -> champion, for one model at a time.

The test rows are looked at once, by the tuned winner and its rivals. Never trains on what a label reads, never scores.
"""

from pipelines.training.publishing import ModelReport as ModelReport
from pipelines.training.run import MODELS as MODELS
from pipelines.training.run import train as train
from pipelines.training.tuning import tune as tune
