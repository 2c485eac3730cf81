"""How well boxes are found: Pascal VOC and COCO average precision of detections."""
