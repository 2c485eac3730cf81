"""Detectors on exported networks, and how well boxes are found: average precision by Pascal VOC and COCO."""
