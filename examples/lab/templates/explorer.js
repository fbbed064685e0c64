// What the page does: it draws one training at a position, which is a number of recorded epochs and runs
// between them while the page plays. Points come in thousandths, three numbers each.
"use strict";
(() => {
const { trainings, classColors, headColors } = JSON.parse(document.getElementById("content").textContent);
const byId = (id) => document.getElementById(id);
const TEXT = "#1c1c1e", GREY = "#b4b4bc", PALE = "#cfcfd6";
const REACH = 1.25; // what of space is sure to be seen, in lengths of a class mean
const MOST_LABELS = 20;
const CURVES = ["nc1", "nc2", "nc3"];
const FAR = window.innerWidth < 600 ? 1.12 : 1; // a small picture has less room for names beside the dots
const CAMERA = { eye: { x: FAR, y: 0.57 * FAR, z: 0.3 * FAR }, center: { x: 0, y: 0, z: 0 }, up: { x: 0, y: 0, z: 1 } };
const SECONDS = 9; // in which a training plays, unless that makes an epoch very short or long
const still = window.matchMedia("(prefers-reduced-motion: reduce)");
const state = { training: trainings[0], run: trainings[0].runs[0], position: 0, playing: 0 };

// Plotly reads a few tags in the texts that it draws, and names of classes may be names of folders.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");
const colorOf = (k) => classColors[k % classColors.length];
const last = () => state.run.frames.length - 1;
const nearestFrame = () => Math.round(state.position);
const digits = (value) => (value === null ? "–" : Number(value.toPrecision(2)).toString());
const percent = (share) => `${(100 * share).toFixed(share > 0.0995 ? 0 : 1)}%`;
const accuracy = (value) => (value === null ? "–" : `${(100 * value).toFixed(1)}%`);

function between(name) {
  // The points of the current position as columns: [xs, ys, zs].
  const before = Math.floor(state.position), part = state.position - before;
  const from = state.run.frames[before][name];
  const to = part ? state.run.frames[before + 1][name] : from;
  const columns = [[], [], []];
  for (let i = 0; i < from.length; i++) columns[i % 3].push((from[i] + part * (to[i] - from[i])) / 1000);
  return columns;
}

function columnsOf(numbers, indices) {
  return [0, 1, 2].map((axis) => indices.map((i) => (i === null ? null : numbers[3 * i + axis] / 1000)));
}

function rays(columns) {
  // From the origin to every point, with a gap between.
  return columns.map((column) => column.flatMap((value) => [0, value, null]));
}

// --- space ---------------------------------------------------------------------------------------------------

const LAYERS = { simplex: [0, 1], features: [2], frame: [3, 4], means: [5] };
const MOVING = [2, 3, 4, 5];

function scatter(columns, more) {
  return { type: "scatter3d", mode: "markers", x: columns[0], y: columns[1], z: columns[2], hoverinfo: "skip", ...more };
}

function spaceTraces() {
  const { classes, corners, edges, targets } = state.training;
  const every = classes.map((_, k) => k), colors = every.map(colorOf), many = classes.length > MOST_LABELS;
  const frame = between("frame"), labels = { color: TEXT, size: 15 };
  return [
    scatter(columnsOf(corners, edges.flatMap(([i, j]) => [i, j, null])),
      { mode: "lines", line: { color: PALE, width: 3 } }),
    scatter(columnsOf(corners, every), { hoverinfo: "text",
      marker: { size: many ? 4 : 7, symbol: "circle-open", color: GREY, line: { width: 2, color: GREY } } }),
    scatter(between("features"), { hoverinfo: "text", hovertext: targets.map((k) => `an image of ${plain(classes[k])}`),
      marker: { size: 3, color: targets.map(colorOf), opacity: 0.55 } }),
    scatter(rays(frame), { mode: "lines", line: { width: 3, color: colors.flatMap((c) => [c, c, c]) } }),
    scatter(frame, { hoverinfo: "text",
      marker: { size: many ? 4 : 8, symbol: "diamond-open", color: colors, line: { width: 2, color: colors } } }),
    scatter(between("means"), { hoverinfo: "text", mode: many ? "markers" : "markers+text", text: classes.map((name) => `${plain(name)}<br> `),
      textposition: "top center", textfont: labels,
      marker: { size: many ? 5 : 9, color: colors, line: { color: "#ffffff", width: 1 } } }),
  ];
}

function spaceLayout() {
  // The axes hold every point of every epoch, and the unit of length is as long in each picture.
  let reach = REACH;
  for (const run of state.training.runs)
    for (const frame of run.frames)
      for (const name of ["means", "frame", "features"])
        for (const value of frame[name]) reach = Math.max(reach, Math.abs(value) / 1000);
  const axis = { visible: false, range: [-reach, reach], autorange: false, showspikes: false };
  const side = reach / REACH;
  return {
    margin: { l: 0, r: 0, t: 0, b: 0 }, showlegend: false, paper_bgcolor: "#ffffff", uirevision: "camera",
    hoverlabel: { bgcolor: "#ffffff", bordercolor: GREY, font: { color: TEXT, size: 13 }, align: "left" },
    scene: { xaxis: axis, yaxis: axis, zaxis: axis, aspectmode: "manual", aspectratio: { x: side, y: side, z: side },
      camera: CAMERA, dragmode: "orbit" },
  };
}

function hoverTexts() {
  const { classes, exact } = state.training, frame = state.run.frames[nearestFrame()];
  const each = (make) => classes.map((name, k) => make(plain(name), k));
  const moment = exact ? "these" : "the last";
  return {
    1: each((name) => `corner of ${name}<br>in the simplex ETF nearest to ${moment} class means`),
    4: each((name, k) => `row of the classifier for ${name}<br>cosine with the class mean ${digits(frame.cosines[k])}`),
    5: each((name, k) => `mean of ${name}<br>distance from its corner ${digits(frame.distances[k])}`
      + `<br>typical distance of its images ${digits(frame.spreads[k])}`),
  };
}

// --- curves --------------------------------------------------------------------------------------------------

function curveTraces(name) {
  const own = state.run, color = headColors[own.head];
  const line = (run, more) => ({ type: "scatter", mode: "lines", x: run.epochs, y: positive(run.measures[name]), ...more });
  const others = state.training.runs.filter((run) => run !== own && run.seed === own.seed);
  return [
    ...others.map((run) => line(run, { line: { color: PALE, width: 1.5 }, hoverinfo: "skip" })),
    line(own, { line: { color, width: 2.5 }, hovertemplate: "epoch %{x}: %{y:.2g}<extra></extra>" }),
    { type: "scatter", mode: "markers", x: [null], y: [null], hoverinfo: "skip", cliponaxis: false,
      marker: { size: 12, color, line: { color: "#ffffff", width: 2 } } },
  ];
}

// Zero has no place on a logarithmic axis.
const positive = (values) => values.map((value) => (value > 0 ? value : null));

function curveLayout(name) {
  const values = state.training.runs.flatMap((run) => positive(run.measures[name])).filter((value) => value !== null);
  const low = Math.min(...values), high = Math.max(...values);
  const decades = values.length ? [Math.log10(low / 1.25), Math.log10(high * 1.25)] : [-2, 0];
  const epochs = state.run.epochs[last()], lengths = Math.max(0, Math.log10(epochs / 5));
  const grid = { gridcolor: "#ececf0", zeroline: false, fixedrange: true, tickfont: { color: "#5c5c63", size: 12 } };
  return {
    margin: { l: 44, r: 10, t: 6, b: 32 }, showlegend: false, dragmode: false, hovermode: "closest",
    xaxis: { ...grid, range: [0, epochs], dtick: 10 ** Math.floor(lengths) * [1, 2, 5][Math.floor(3 * (lengths % 1))], title: { text: "epoch", font: { size: 12 }, standoff: 4 } },
    yaxis: { ...grid, type: "log", range: decades, tickmode: "array", ...ticks(...decades) },
    shapes: [{ type: "line", x0: 0, x1: 0, y0: 0, y1: 1, yref: "paper", line: { color: GREY, width: 1 } }],
  };
}

function ticks(from, to) {
  // Few enough numbers to be read: 1, 2 and 5 of a short axis, decades or some of them of a long one.
  const steps = to - from < 1.4 ? [1, 2, 5] : to - from < 2.5 ? [1, 3] : [1], every = Math.ceil((to - from) / 5), tickvals = [];
  for (let decade = Math.floor(from); decade <= Math.ceil(to); decade++)
    if (decade % every === 0) for (const step of steps) tickvals.push(step * 10 ** decade);
  return { tickvals, ticktext: tickvals.map((value) => Number(value.toPrecision(1)).toString()) };
}

function onCurve(name) {
  // Where the marker stands: on the straight line between two epochs of the logarithmic axis.
  const before = Math.floor(state.position), part = state.position - before;
  const values = positive(state.run.measures[name]), { epochs } = state.run;
  const after = part ? before + 1 : before;
  const known = values[before] !== null && values[after] !== null;
  return [
    epochs[before] + part * (epochs[after] - epochs[before]),
    known ? values[before] ** (1 - part) * values[after] ** part : null,
  ];
}

// --- drawing -------------------------------------------------------------------------------------------------

const PLAIN = { displayModeBar: false, responsive: true };

let drawn = null; // the training that Plotly has

function drawAll() {
  // A new training or head: everything is drawn. The camera stays where it is for another head of the same training.
  state.position = Math.min(state.position, last());
  const draw = state.training === drawn ? Plotly.react : Plotly.newPlot;
  drawn = state.training;
  draw("space", spaceTraces(), spaceLayout(), PLAIN);
  for (const name of CURVES) Plotly.react(name, curveTraces(name), curveLayout(name), PLAIN);
  byId("epoch").max = last();
  showLayers();
  describe();
  move();
}

function move() {
  // The position has changed: only what moves is drawn.
  const moving = { 2: between("features"), 4: between("frame"), 5: between("means") };
  moving[3] = rays(moving[4]);
  const axes = ["x", "y", "z"].map((axis, i) => [axis, MOVING.map((trace) => moving[trace][i])]);
  const done = [Plotly.restyle("space", Object.fromEntries(axes), MOVING)];
  for (const name of CURVES) {
    const [x, y] = onCurve(name), marker = byId(name).data.length - 1;
    done.push(Plotly.update(name, { x: [[x]], y: [[y]] }, { "shapes[0].x0": x, "shapes[0].x1": x }, [marker]));
  }
  tell();
  return Promise.all(done);
}

let told = null; // the frame and run whose numbers stand on the page

function tell() {
  // Numbers belong to a recorded epoch: they change when the nearest one does.
  const number = nearestFrame(), { run } = state;
  if (told !== null && told.number === number && told.run === run) return;
  told = { number, run };
  const { measures, epochs } = run, texts = hoverTexts();
  for (const name of CURVES) byId(name).closest("figure").querySelector("output").textContent = digits(measures[name][number]);
  [...byId("shares").querySelectorAll("dd")].forEach((place, i) => {
    place.textContent = percent(run.frames[number].shares[i]);
  });
  const label = document.createElement("b");
  label.textContent = `Epoch ${epochs[number]} of ${epochs[last()]}`;
  const [train, test] = [measures.train_accuracy, measures.test_accuracy].map((values) => accuracy(values[number]));
  const rest = ` · accuracy ${train}, test ${test}`;
  byId("now").replaceChildren(label, rest);
  const slider = byId("epoch");
  slider.value = number;
  slider.setAttribute("aria-valuetext", `epoch ${epochs[number]}`);
  Plotly.restyle("space", { hovertext: Object.values(texts) }, Object.keys(texts).map(Number));
}

function describe() {
  const { classes, exact } = state.training, count = classes.length;
  const shape = { 2: "line", 3: "triangle", 4: "tetrahedron" }[count];
  byId("look").textContent = `press play. The small dots shrink onto their large dot, the large dots move to the corners of the`
    + ` grey ${shape ?? "figure"}, and the diamonds come to the same corners.`;
  byId("exact").textContent = exact
    ? `This picture is exact for the class means: ${count} of them, less their average, span ${count - 1} dimensions, and all`
      + ` distances between them are kept. It turns with them, so that the simplex ETF nearest to the class means stands still.`
      + ` Images and classifier rows appear as their shadow in this space. Share of the variance that it shows at this epoch:`
    : `This picture is a shadow: ${count} class means, less their average, span ${count - 1} dimensions, and it shows 3 of them,`
      + ` the same at every epoch. They were chosen so that the corners of the simplex ETF nearest to the last class means lie`
      + ` apart. Share of the variance that it shows at this epoch:`;
  byId("alone").textContent = title(state.training);
  byId("space").setAttribute("aria-label", `${state.training.title}, head ${state.run.head}: class means, images and`
    + ` classifier rows in three dimensions`);
}

function showLayers() {
  for (const box of byId("layers").querySelectorAll("input"))
    Plotly.restyle("space", { visible: box.checked }, LAYERS[box.value]);
}

// --- choices -------------------------------------------------------------------------------------------------

function fill(select, labels) {
  select.replaceChildren(...labels.map((label, i) => new Option(label, i)));
  select.parentElement.hidden = labels.length < 2;
}

const title = ({ title, classes }) => `${title.charAt(0).toUpperCase()}${title.slice(1)}, ${classes.length} classes`;
const heads = () => [...new Set(state.training.runs.map((run) => run.head))];
const seeds = () => [...new Set(state.training.runs.map((run) => run.seed))];

function offerRuns() {
  fill(byId("seed"), seeds());
  byId("seed").value = seeds().indexOf(state.run.seed);
  byId("heads").querySelectorAll("label").forEach((label) => label.remove());
  for (const head of heads()) {
    const label = document.createElement("label"), radio = document.createElement("input");
    const dot = document.createElement("i");
    Object.assign(radio, { type: "radio", name: "head", value: head, checked: head === state.run.head });
    dot.style.background = headColors[head];
    label.append(radio, dot, head);
    byId("heads").append(label);
  }
}

function choose(head, seed) {
  const { runs } = state.training;
  state.run = runs.find((run) => run.head === head && run.seed === seed) ?? runs.find((run) => run.head === head) ?? runs[0];
  drawAll();
}

byId("training").addEventListener("change", (event) => {
  const { head, seed } = state.run;
  pause();
  state.training = trainings[event.target.value];
  state.position = 0;
  choose(head, seed);
  offerRuns();
});
byId("seed").addEventListener("change", (event) => choose(state.run.head, seeds()[event.target.value]));
byId("heads").addEventListener("change", (event) => choose(event.target.value, state.run.seed));
byId("layers").addEventListener("change", showLayers);
byId("choices").addEventListener("submit", (event) => event.preventDefault());

byId("turn").addEventListener("click", (event) => {
  const way = event.target.dataset.turn;
  if (way === undefined) return;
  const { eye } = byId("space").layout.scene.camera, angle = (Number(way) * Math.PI) / 12;
  const turned = {
    x: eye.x * Math.cos(angle) - eye.y * Math.sin(angle),
    y: eye.x * Math.sin(angle) + eye.y * Math.cos(angle),
    z: eye.z,
  };
  Plotly.relayout("space", { "scene.camera": way === "0" ? CAMERA : { ...CAMERA, eye: turned } });
});

// --- time ----------------------------------------------------------------------------------------------------

function go(position) {
  state.position = Math.max(0, Math.min(last(), position));
  return move();
}

function pause() {
  state.playing = 0;
  byId("play").classList.remove("playing");
  byId("play").querySelector("b").textContent = "Play";
}

let plays = 0; // how often play was pressed: each press has its own loop, and only the last one goes on

async function play() {
  const mine = state.playing = ++plays;
  byId("play").classList.add("playing");
  byId("play").querySelector("b").textContent = "Pause";
  const start = state.position >= last() ? 0 : state.position;
  const perFrame = Math.max(150, Math.min(900, (1000 * SECONDS) / last()));
  const began = performance.now();
  while (state.playing === mine) {
    const now = await new Promise(requestAnimationFrame);
    if (state.playing !== mine) return;
    const position = Math.min(last(), start + Math.max(0, now - began) / perFrame);
    await go(still.matches ? Math.floor(position) : position);
    if (position >= last()) pause();
  }
}

byId("play").addEventListener("click", () => (state.playing ? pause() : play()));
byId("epoch").addEventListener("input", (event) => {
  pause();
  go(Number(event.target.value));
});

fill(byId("training"), trainings.map(title));
byId("alone").hidden = trainings.length > 1;
offerRuns();
drawAll();
for (const name of CURVES)
  byId(name).on("plotly_click", (event) => {
    pause();
    go(state.run.epochs.indexOf(event.points[0].x));
  });
})();
