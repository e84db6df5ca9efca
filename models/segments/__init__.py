"""Customer segments: clusters that are really there, tiers of value, the state of the life cycle, and what moved between two times."""

from models.segments.behaviour import NEEDED as NEEDED
from models.segments.behaviour import behaviour as behaviour
from models.segments.lifecycle import Lifecycle as Lifecycle
from models.segments.membership import Movement as Movement
from models.segments.membership import movement as movement
from models.segments.rfm import RfmEdges as RfmEdges
from models.segments.segmenter import Segmenter as Segmenter
from models.segments.segmenter import WeakStructure as WeakStructure
