"""Where the parts of a house's front go: outline, window columns, bays, storeys, ground floor, mouldings, extras."""

import numpy as np
from numpy.random import PCG64, Generator

from sample_data.renderer.buildings import Builder, House, pick
from sample_data.renderer.facade_parts import Awning, Facade, Opening, Panel, Rail, darken
from sample_data.renderer.street_geometry import Array


def design_facade(house: House) -> Facade:
    """Lay out a house's front; the same house always gives the same front."""
    rng = Generator(PCG64(house.seed))
    builder = house.builder
    height = builder.ground_m + (house.floors - 1) * builder.upper_m + 0.5
    facade = Facade(house, height, outline_of(house, height))
    columns = place_columns(house)
    bay_columns = place_bay(facade, columns)
    for floor in range(1, house.floors):
        fill_storey(facade, floor, columns, bay_columns, rng)
    if house.ground == "shop":
        add_shop(facade, rng)
    elif house.ground == "lobby":
        add_lobby(facade, columns)
    else:
        add_home(facade, columns, bay_columns)
    add_mouldings(facade)
    add_extras(facade, rng)
    return facade


def outline_of(house: House, height: float) -> Array:
    """Return the front's silhouette (N, 2): a rectangle, or a gable that rises above the eaves."""
    width, roof = house.width_m, house.builder.roof
    right = [(width, height)]  # the right half, from the eaves up
    if roof == "front":
        right.append((width / 2, height + width * 0.38))
    elif roof == "stepped":
        steps, tread = 4, width * 0.11
        right = [(width - tread * k, height + 0.75 * j) for k in range(steps) for j in (k, k + 1)]
    elif roof == "bell":
        curve = [(0.0, 0.0), (0.06, 0.9), (0.2, 1.5), (0.27, 2.3), (0.36, 3.0), (0.5, 3.3)]
        right = [(width * (1 - u), height + z) for u, z in curve]
    left = [(width - x, z) for x, z in reversed(right) if x != width / 2]
    return np.array([(0.0, 0.0), (width, 0.0), *right, *left])


def place_columns(house: House) -> Array:
    """Return the x of each window column's centre."""
    builder = house.builder
    margin = 0.55 if house.width_m < 9 else 0.9
    usable = house.width_m - 2 * margin
    count = max(1, round(usable / builder.column_m))
    pitch = usable / count
    centres: Array = margin + pitch * np.arange(0.5, count)
    slack = max(0.0, pitch - builder.window_width_m - 0.35)
    if builder.rhythm == "paired":
        centres = centres + np.where(np.arange(count) % 2 == 0, 0.4, -0.4).astype(np.float64) * slack
    elif builder.rhythm == "centre" and count >= 3:
        away = np.sign(np.arange(count) - (count - 1) / 2)
        centres = centres + away * 0.2 * slack
    return centres


def place_bay(facade: Facade, columns: Array) -> set[int]:
    """Stand a bay before one column, if the house has one, and return the columns that it takes."""
    house, builder = facade.house, facade.house.builder
    if builder.bay == "none" or not house.bay or len(columns) < 2 or house.ground != "home":
        return set()
    column = 0 if house.mirrored else len(columns) - 1
    half = min(1.45, float(columns[1] - columns[0]) * 0.48 + 0.1)
    centre = float(np.clip(columns[column], half + 0.15, house.width_m - half - 0.15))
    floors = house.floors if builder.bay == "canted" else min(2, house.floors)
    top = builder.ground_m + (floors - 1) * builder.upper_m - (0.0 if floors < house.floors else 0.25)
    left, right = centre - half, centre + half
    if builder.bay == "canted":
        cuts = [(left, left + half * 0.5, 0.0, 0.75), (left + half * 0.5, right - half * 0.5, 0.75, 0.75)]
        cuts.append((right - half * 0.5, right, 0.75, 0.0))
        facade.panels += [Panel(a, b, 0.0, top, p, q) for a, b, p, q in cuts]
    else:
        facade.panels.append(Panel(left, right, 0.0, top, 0.6, 0.6))
    for panel in facade.panels:
        for floor in range(floors):
            base = builder.ground_m + (floor - 1) * builder.upper_m if floor else 0.0
            storey = builder.upper_m if floor else builder.ground_m
            inset = 0.14 if panel.x1 - panel.x0 > 0.6 else 0.1
            z0, z1 = base + 0.75, min(base + storey - 0.35, top - 0.2)
            facade.openings.append(Opening(panel.x0 + inset, panel.x1 - inset, z0, z1, "bay", "flat", 0.0, (1, 2)))
    return {column}


def fill_storey(facade: Facade, floor: int, columns: Array, taken: set[int], rng: Generator) -> None:
    """Put one window, with its trimmings and perhaps a balcony, on each column of an upper storey."""
    house, builder = facade.house, facade.house.builder
    base = builder.ground_m + (floor - 1) * builder.upper_m
    pitch = float(columns[1] - columns[0]) if len(columns) > 1 else builder.column_m
    width = min(builder.window_width_m, pitch - 0.4)
    fill = builder.window_fill * (1.0 if floor < house.floors - 1 or house.floors < 4 else 0.86)
    low = 0.12 if has_balcony(builder, floor, house.floors) else builder.upper_m * (1 - fill) * 0.62
    z1 = base + low + builder.upper_m * fill + (0.0 if low > 0.2 else builder.upper_m * (1 - fill) * 0.5)
    for i, centre in enumerate(columns):
        if i in taken and facade.panels and base < facade.panels[0].z1 - 1.0:
            continue
        x = float(centre) + (0.3 * (pitch - width) * (-1) ** (floor + i) if builder.rhythm == "shifted" else 0.0)
        kind = "blind" if len(columns) > 3 and rng.random() < 0.015 else "window"
        window = Opening(x - width / 2, x + width / 2, base + low, min(z1, base + builder.upper_m - 0.2), kind,
                         builder.window_top, 0.2, builder.panes)  # fmt: skip
        facade.openings.append(window)
        add_trimmings(facade, window, floor, i)
    if has_balcony(builder, floor, house.floors) and builder.balcony == "iron" and floor in {2, house.floors - 1}:
        add_balcony(facade, 0.25, house.width_m - 0.25, base, 0.6)


def has_balcony(builder: Builder, floor: int, floors: int) -> bool:
    """Tell whether a storey's windows reach its floor."""
    return builder.balcony in {"french", "glass", "slab"} or (builder.balcony == "iron" and floor in {1, 2, floors - 1})


def add_trimmings(facade: Facade, window: Opening, floor: int, column: int) -> None:
    """Add the sill, the head and, where the builder has them, the column's own balcony."""
    builder, house = facade.house.builder, facade.house
    trim, width = builder.trim_rgb, window.x1 - window.x0
    if has_balcony(builder, floor, house.floors):
        single = builder.balcony in {"french", "iron"}
        if builder.balcony in {"glass", "slab"} and (column + floor * house.mirrored) % 2 == 0:
            add_balcony(facade, window.x0 - 0.5, window.x1 + 0.5, window.z0 - 0.12, 1.2)
        elif single and floor != 2 or builder.balcony == "french":
            add_balcony(facade, window.x0 - 0.1, window.x1 + 0.1, window.z0 - 0.12, 0.28)
    elif builder.head != "none" or builder.style["window_fill"][1] < 0.7:
        facade.add((window.x0 - 0.1, window.x1 + 0.1), (window.z0 - 0.12, window.z0), 0.1, trim)
    if window.top == "flat" and builder.head in {"keystone", "lintel", "pediment"}:
        facade.add((window.x0 - 0.12, window.x1 + 0.12), (window.z1, window.z1 + 0.2), 0.05, trim)
    if builder.head == "pediment" and floor == 1:
        facade.add((window.x0 - 0.2, window.x1 + 0.2), (window.z1 + 0.2, window.z1 + 0.32), 0.2, trim)
    if builder.head == "keystone":
        middle = window.x0 + width / 2
        facade.add((middle - 0.11, middle + 0.11), (window.z1 - 0.08, window.z1 + 0.28), 0.1, darken(trim, 1.05))


def add_balcony(facade: Facade, x0: float, x1: float, z: float, depth_m: float) -> None:
    """Add a slab with a railing before it."""
    builder = facade.house.builder
    solid = {"glass": ((150, 170, 176), 9.0), "slab": (builder.wall_rgb, 9.0)}
    rgb, step = solid.get(builder.balcony, ((34, 36, 40), 0.13))
    if depth_m > 0.4:
        facade.add((x0, x1), (z - 0.05, z + 0.12), depth_m, darken(builder.trim_rgb, 0.92))
    facade.rails.append(Rail(x0, x1, z + 0.12, z + 1.05, depth_m, rgb, step))


def add_home(facade: Facade, columns: Array, taken: set[int]) -> None:
    """Add a front door with its steps, windows beside it and, for some, a garage door."""
    house, builder = facade.house, facade.house.builder
    free = [i for i in range(len(columns)) if i not in taken]
    door_column = free[-1] if house.mirrored or len(free) < 3 else free[house.seed % len(free)]
    others = [i for i in (free[0], free[-1]) if i != door_column]
    garage_column = others[0] if others and house.ground == "garage" else None
    lift = 0.45 if builder.style["garden_m"][0] > 0 or house.seed % 3 == 0 else 0.15
    width = builder.window_width_m if builder.window_width_m < 1.5 else 1.6
    for i in free:
        x = float(columns[i])
        if i == door_column:
            door = Opening(x - 0.55, x + 0.55, lift, lift + min(2.75, builder.ground_m - lift - 0.3), "door",
                           "round" if builder.window_top == "round" else "flat", 0.25)  # fmt: skip
            facade.openings.append(door)
            facade.add((x - 0.8, x + 0.8), (0.0, lift * 0.5), 0.7, (170, 166, 158))
            facade.add((x - 0.8, x + 0.8), (lift * 0.5, lift), 0.38, (176, 172, 164))
            if house.seed % 2:
                facade.add((x - 0.85, x + 0.85), (door.z1 + 0.1, door.z1 + 0.28), 0.6, builder.trim_rgb)
        elif i == garage_column:
            half = min(1.3, builder.column_m / 2 - 0.2)
            facade.openings.append(Opening(x - half, x + half, 0.05, 2.35, "garage", reveal_m=0.22))
        else:
            z0 = lift + 0.6
            window = Opening(x - width / 2, x + width / 2, z0, max(z0 + 1.1, builder.ground_m - 0.55), "window",
                             builder.window_top, 0.2, builder.panes)  # fmt: skip
            facade.openings.append(window)
            add_trimmings(facade, window, 0, i)


def add_shop(facade: Facade, rng: Generator) -> None:
    """Add a shopfront: glass over a stall riser, a recessed door, a signboard and perhaps an awning."""
    house, builder = facade.house, facade.house.builder
    head = min(2.85, builder.ground_m - 0.75)
    bays = max(1, round((house.width_m - 0.6) / 4.5))
    door_bay = int(rng.integers(bays))
    step = (house.width_m - 0.6) / bays
    for i in range(bays):
        left, right = 0.3 + i * step + 0.14, 0.3 + (i + 1) * step - 0.14
        if i == door_bay:
            right -= 1.15
            facade.openings.append(Opening(right + 0.12, right + 1.15, 0.08, head, "door", reveal_m=0.35))
        panes = (max(1, round((right - left) / 1.3)), 1)
        facade.openings.append(Opening(left, right, 0.5, head, "shop", "flat", 0.08, panes))
        facade.add((0.3 + i * step - 0.1, 0.3 + i * step + 0.1), (0.0, head + 0.05), 0.1, darken(house.shop_rgb, 0.85))
    facade.fascia = (0.2, house.width_m - 0.2, head + 0.06, head + 0.6)
    facade.add((0.15, house.width_m - 0.15), (head + 0.6, head + 0.7), 0.3, darken(house.shop_rgb, 0.9))
    if house.awning:
        other = (236, 232, 222) if house.seed % 3 else darken(house.shop_rgb, 0.7)
        facade.awnings.append(Awning(0.4, house.width_m - 0.4, head - 0.55, head + 0.05, 1.25, house.shop_rgb, other))


def add_lobby(facade: Facade, columns: Array) -> None:
    """Add tall glazing between piers with an entrance under a canopy."""
    house, builder = facade.house, facade.house.builder
    entrance = len(columns) // 2 if not house.mirrored else 0
    half = min(builder.column_m * 0.42, 1.7)
    for i, x in enumerate(columns.tolist()):
        kind = "entrance" if i == entrance else "hall"
        z0 = 0.08 if kind == "entrance" else (0.12, 0.6)[house.seed % 2]
        facade.openings.append(Opening(x - half, x + half, z0, builder.ground_m - 0.5, kind, "flat", 0.3, (2, 2)))
        if kind == "entrance":
            span = (x - half - 0.4, x + half + 0.4)
            facade.add(span, (builder.ground_m - 0.45, builder.ground_m - 0.25), 1.3, builder.frame_rgb)


def add_mouldings(facade: Facade) -> None:
    """Add plinth, string courses, cornice, quoins and the caps of bays and gables."""
    house, builder, width = facade.house, facade.house.builder, facade.house.width_m
    trim, top = builder.trim_rgb, facade.height_m
    if builder.string_course:
        facade.add((0.0, width), (builder.ground_m - 0.16, builder.ground_m), 0.12, trim)
        if house.floors > 3:
            z = builder.ground_m + (house.floors - 2) * builder.upper_m
            facade.add((0.0, width), (z - 0.1, z), 0.1, trim)
    if builder.roof in {"flat", "mansard", "side", "hip"} and builder.cornice_m > 0.1:
        deep = builder.cornice_m if builder.roof in {"flat", "mansard"} else 0.45
        facade.add((-0.02, width + 0.02), (top - 0.42, top - 0.22), deep * 0.6, darken(trim, 0.95))
        facade.add((-0.02, width + 0.02), (top - 0.22, top), deep, trim)
    if builder.quoins:
        for z in np.arange(builder.ground_m, top - 0.9, 0.8):
            for x0, x1 in ((0.0, 0.45), (width - 0.45, width)):
                facade.add((x0, x1), (float(z), float(z) + 0.38), 0.04, trim)
    if facade.panels:
        left, right, z = facade.panels[0].x0, facade.panels[-1].x1, facade.panels[0].z1
        deep = max(p.y0 for p in facade.panels)
        facade.add((left - 0.06, right + 0.06), (z - 0.05, z + 0.16), deep + 0.12, darken(trim, 0.95))


def add_extras(facade: Facade, rng: Generator) -> None:
    """Add what owners hang on their walls: rain pipes, flower boxes, cooling units, an alarm, a hanging sign."""
    house, width = facade.house, facade.house.width_m
    if rng.random() < 0.7 and not facade.panels:
        x = pick(rng, (0.12, width - 0.22))
        tone = pick(rng, (darken(house.wall_rgb, 0.55), (52, 54, 56), (206, 204, 198)))
        facade.add((x, x + 0.1), (0.0, facade.height_m - 0.45), 0.11, tone)
    flowers = rng.random() < 0.3
    units = rng.random() < 0.2
    for window in [o for o in facade.openings if o.kind == "window" and o.z0 > 3.0]:
        if flowers and window.x1 - window.x0 < 1.4 and rng.random() < 0.7:
            facade.add((window.x0, window.x1), (window.z0 - 0.02, window.z0 + 0.16), 0.26, (104, 72, 50))
            bloom = pick(rng, ((186, 60, 70), (96, 128, 60), (214, 150, 170)))
            facade.add((window.x0 + 0.04, window.x1 - 0.04), (window.z0 + 0.16, window.z0 + 0.34), 0.24, bloom)
        elif units and rng.random() < 0.3:
            x, z = window.x1 - 0.75, window.z0 - 0.62
            facade.add((x, x + 0.75), (z, z + 0.5), 0.32, (214, 214, 210))
    if rng.random() < 0.5:
        x, z = float(rng.uniform(0.5, width - 0.9)), facade.house.builder.ground_m - 0.1
        facade.add((x, x + 0.3), (z, z + 0.36), 0.1, pick(rng, ((224, 196, 60), (190, 40, 40), (230, 232, 236))))
    if facade.fascia and rng.random() < 0.7:
        x = float(rng.uniform(0.5, width - 0.6))
        facade.add((x, x + 0.08), (facade.fascia[3] + 0.2, facade.fascia[3] + 0.95), 0.85, darken(house.shop_rgb, 1.15))
