from ropewalk.maps import SELF, Identity, LeakyReRoPE, ReRoPE, SelfExtend
