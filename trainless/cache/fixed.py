from .compressing import CompressingLayer
class FixedLayer(CompressingLayer):
    pass
