"""A capsule figure that moves by DeepMimic's motion capture, rendered on the CPU by pybullet, every joint known.

The world is y-up; the figure of `humanoid.urdf` looks along +x, its right is +z. Lengths in metres.
"""

import json
import math
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

SPHERICAL = {1: 8, 2: 12, 3: 16, 5: 21, 6: 25, 9: 30, 11: 35, 12: 39}
"""Joint of the figure → where its quaternion (w, x, y, z) begins in a frame of motion capture."""
HINGES = {4: 20, 7: 29, 10: 34, 13: 43}
"""Joint of the figure → where its angle (radians) lies in a frame."""
NECK = 2
RIGHT, LEFT = ((6, 7, 8, 3, 4, 5), (12, 13, 14, 9, 10, 11))
"""Links: shoulder, elbow, wrist, hip, knee, ankle."""
PARTS = {
    "root": "trousers", "chest": "shirt", "neck": "skin", "hip": "trousers", "knee": "trousers", "ankle": "shoes",
    "shoulder": "shirt", "elbow": "sleeve", "wrist": "skin",
}  # fmt: skip
"""Link, without its side → what it wears."""
SCALE = 0.25
"""Scale from the file, which is four times as large as a person, to metres."""


@dataclass(frozen=True)
class Body:
    """What one person looks like."""

    legs: float
    """Length over the file's own; likewise the next."""
    arms: float
    girth: float
    """Radii."""
    head: float
    colors: dict[str, tuple[float, float, float]]
    """Of `PARTS`' values: RGB in 0..1."""


def random_body(rng: np.random.Generator) -> Body:
    """A person out of a seed."""
    tone = rng.uniform(0.25, 1)
    skin = (0.95 * tone, (0.62 + 0.1 * rng.random()) * tone, (0.45 + 0.15 * rng.random()) * tone)
    shirt, trousers, shoes = (tuple(rng.uniform(0.05, 1, 3)) for _ in range(3))
    sleeve = shirt if rng.random() < 0.5 else skin
    colors = {"skin": skin, "shirt": shirt, "trousers": trousers, "shoes": shoes, "sleeve": sleeve}
    return Body(
        rng.uniform(0.85, 1.15), rng.uniform(0.85, 1.15), rng.uniform(0.75, 1.35), rng.uniform(0.85, 1.15), colors
    )


def figure(data: Path, body: Body) -> str:
    """The file of the figure, its proportions and colours changed: URDF text. data: pybullet's data folder."""
    robot = ET.fromstring(_text(data / "humanoid" / "humanoid.urdf"))
    for link in robot.iter("link"):
        side, collision = link.get("name").split("_")[-1], link.find("collision")
        if collision is None:
            continue
        visual = ET.SubElement(link, "visual")
        visual.extend(collision)
        link.remove(collision)
        length = {"hip": body.legs, "knee": body.legs, "shoulder": body.arms, "elbow": body.arms}.get(side, 1.0)
        radius = body.head if side == "neck" else body.girth
        for shape in visual.find("geometry"):
            for name, factor in (("radius", radius), ("length", length)):
                if name in shape.attrib:
                    shape.set(name, str(float(shape.get(name)) * factor))
        _stretch(visual.find("origin"), length)
        material = ET.SubElement(visual, "material", name=link.get("name"))
        ET.SubElement(material, "color", rgba=" ".join(map(str, (*body.colors[PARTS[side]], 1))))
    for joint in robot.iter("joint"):
        # A joint's origin lies in the link above it: knees and ankles hang on legs, elbows and wrists on arms.
        side = joint.get("name").split("_")[-1]
        length = {"knee": body.legs, "ankle": body.legs, "elbow": body.arms, "wrist": body.arms}.get(side, 1.0)
        _stretch(joint.find("origin"), length)
        if joint.find("axis") is None:
            ET.SubElement(joint, "axis", xyz="1 0 0")  # what bullet takes anyway, without a warning for each
    return ET.tostring(robot, encoding="unicode")


def _stretch(origin: ET.Element, factor: float) -> None:
    origin.set("xyz", " ".join(str(float(value) * factor) for value in origin.get("xyz").split()))


def _text(path: Path) -> str:
    return path.read_bytes().decode("ascii", "ignore").replace("\0", "")


@cache
def motion(data: Path, name: str) -> tuple[np.ndarray, np.ndarray, bool]:
    """Motion capture: (start of every frame in seconds [N], frames [N, 44], whether it goes round)."""
    stored = json.loads((data / "data" / "motions" / f"humanoid3d_{name}.txt").read_text())
    frames = np.array(stored["Frames"])
    return np.concatenate([[0], np.cumsum(frames[:-1, 0])]), frames, stored["Loop"] == "wrap"


def at(data: Path, name: str, time_s: float) -> np.ndarray:
    """A motion's frame [44] at any time: between two frames interpolated, around the end repeated or held."""
    starts, frames, loops = motion(data, name)
    length_s = starts[-1]
    rounds, inside = divmod(time_s, length_s) if loops else (0, min(max(time_s, 0.0), length_s))
    after = min(int(np.searchsorted(starts, inside, side="right")), len(starts) - 1)
    share = (inside - starts[after - 1]) / (starts[after] - starts[after - 1])
    one, other = frames[after - 1].copy(), frames[after].copy()
    for place in (4, *SPHERICAL.values()):  # q and -q are one rotation: the nearer one
        if one[place : place + 4] @ other[place : place + 4] < 0:
            other[place : place + 4] *= -1
    out = (1 - share) * one + share * other
    for place in (4, *SPHERICAL.values()):
        out[place : place + 4] /= np.linalg.norm(out[place : place + 4])
    out[[1, 3]] += rounds * (frames[-1] - frames[0])[[1, 3]]
    return out


@dataclass(frozen=True)
class Camera:
    """Looks at a point, upright."""

    target: np.ndarray
    yaw_rad: float
    pitch_rad: float
    """The camera's angle above the horizon."""
    fov_rad: float
    """From the bottom of the picture to its top."""
    distance: float

    @property
    def eye(self) -> np.ndarray:
        flat = math.cos(self.pitch_rad)
        towards = (flat * math.cos(self.yaw_rad), math.sin(self.pitch_rad), flat * math.sin(self.yaw_rad))
        return self.target + self.distance * np.array(towards)

    def project(self, points: np.ndarray, aspect: float) -> np.ndarray:
        """World [..., 3] → x, y of the picture in 0..1 [..., 2]."""
        forward = self.target - self.eye
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, (0, 1, 0))
        right /= np.linalg.norm(right)
        up = np.cross(right, forward)
        seen = points - self.eye
        depth = seen @ forward * math.tan(self.fov_rad / 2)
        return np.stack([0.5 + 0.5 * (seen @ right) / depth / aspect, 0.5 - 0.5 * (seen @ up) / depth], -1)


@cache
def _world() -> int:
    """This process's pybullet world: making one costs as much as rendering some frames."""
    import pybullet

    return pybullet.connect(pybullet.DIRECT)


class Stage:
    """One figure in this process's world, which a new stage empties. Not picklable: make it where it works."""

    def __init__(self, body: Body):
        import pybullet
        import pybullet_data

        self.bullet, self.body = pybullet, body
        self.data = Path(pybullet_data.getDataPath())
        self.world = _world()
        pybullet.resetSimulation(physicsClientId=self.world)
        with tempfile.NamedTemporaryFile("w", suffix=".urdf") as file:
            file.write(figure(self.data, body))
            file.flush()
            flags = pybullet.URDF_MAINTAIN_LINK_ORDER | pybullet.URDF_USE_MATERIAL_COLORS_FROM_MTL
            self.person = pybullet.loadURDF(
                file.name, globalScaling=SCALE, useFixedBase=True, flags=flags, physicsClientId=self.world
            )

    def box(self, center: np.ndarray, half: tuple[float, float, float], yaw_rad: float, color: np.ndarray) -> None:
        """Put a box into the world."""
        bullet, world = self.bullet, self.world
        turned = bullet.getQuaternionFromEuler((0, -yaw_rad, 0))
        shape = bullet.createVisualShape(
            bullet.GEOM_BOX, halfExtents=half, rgbaColor=(*color, 1), physicsClientId=world
        )
        bullet.createMultiBody(
            baseVisualShapeIndex=shape, basePosition=tuple(center), baseOrientation=turned, physicsClientId=world
        )

    def put(self, frame: np.ndarray, middle: np.ndarray | None = None) -> np.ndarray:
        """Put the figure into a frame of motion capture, over `middle` (x, z) if given; BlazePose's points [33, 3]."""
        bullet, world, person = self.bullet, self.world, self.person
        place = np.array(frame[1:4])
        place[1] *= self.body.legs
        if middle is not None:
            place[[0, 2]] = middle
        bullet.resetBasePositionAndOrientation(person, tuple(place), _xyzw(frame[4:8]), physicsClientId=world)
        for joint, start in SPHERICAL.items():
            bullet.resetJointStateMultiDof(person, joint, _xyzw(frame[start : start + 4]), physicsClientId=world)
        for joint, angle in HINGES.items():
            bullet.resetJointState(person, joint, frame[angle], physicsClientId=world)
        return self._points()

    def _points(self) -> np.ndarray:
        """Where BlazePose's points are: joints exactly, the face on the head's ball, hands and feet by their links."""
        bullet = self.bullet
        states = bullet.getLinkStates(
            self.person, list(range(1, 15)), computeForwardKinematics=True, physicsClientId=self.world
        )
        places = {link: np.array(state[4]) for link, state in enumerate(states, 1)}
        axes = {link: np.array(bullet.getMatrixFromQuaternion(s[5])).reshape(3, 3) for link, s in enumerate(states, 1)}
        out = np.empty((33, 3))
        head, turned, radius = places[NECK], axes[NECK], 0.41 * SCALE * self.body.head
        ball = head + turned @ np.array((0, 0.7 * SCALE, 0))
        face = {0: (1, 0, 0), 7: (0, 0, -1), 8: (0, 0, 1), 9: (0.85, -0.5, -0.2), 10: (0.85, -0.5, 0.2)}
        face |= {
            n: (0.85, 0.35, side * z)
            for side, first in ((-1, 1), (1, 4))
            for n, z in enumerate((0.2, 0.35, 0.5), first)
        }
        for number, towards in face.items():
            out[number] = ball + turned @ (radius * np.array(towards))
        for first, links in ((11, LEFT), (12, RIGHT)):
            for number, link in enumerate(links):
                out[first + 2 * number + (6 if number > 2 else 0)] = places[link]
            elbow, wrist, ankle, foot = places[links[1]], places[links[2]], places[links[5]], axes[links[5]]
            along = (wrist - elbow) / np.linalg.norm(wrist - elbow)
            across = axes[links[2]] @ np.array((1.0, 0, 0))
            for finger, side in ((17, -0.3), (19, 0.1), (21, 0.5)):
                out[finger + first - 11] = wrist + 0.08 * along + 0.05 * side * across
            out[29 + first - 11] = ankle + foot @ (SCALE * np.array((-0.17, -0.15, 0)))
            out[31 + first - 11] = ankle + foot @ (SCALE * np.array((0.53, -0.15, 0)))
        return out

    def picture(self, camera: Camera, height: int, width: int, light: np.ndarray) -> np.ndarray:
        """What a camera sees: uint8 RGB [height, width, 3]. light: direction that it comes from."""
        bullet = self.bullet
        view = bullet.computeViewMatrix(tuple(camera.eye), tuple(camera.target), (0, 1, 0))
        lens = bullet.computeProjectionMatrixFOV(math.degrees(camera.fov_rad), width / height, 0.05, 60.0)
        _, _, colors, _, _ = bullet.getCameraImage(
            width, height, view, lens, lightDirection=tuple(light), shadow=1, lightAmbientCoeff=0.55,
            lightDiffuseCoeff=0.5, lightSpecularCoeff=0.05, renderer=bullet.ER_TINY_RENDERER,
            flags=bullet.ER_NO_SEGMENTATION_MASK, physicsClientId=self.world,
        )  # fmt: skip
        return np.asarray(colors, np.uint8).reshape(height, width, 4)[..., :3]


def _xyzw(wxyz: np.ndarray) -> tuple[float, ...]:
    w, x, y, z = wxyz
    return (x, y, z, w)
