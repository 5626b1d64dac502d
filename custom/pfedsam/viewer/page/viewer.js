// The page of the viewer. All that it shows comes from paths below its own address, which holds the token.
import { Niivue } from './niivue.js';

const AXIAL = 0;
const PAN = 3, CROSSHAIR = 8;
// colour-blind safe (Okabe and Ito); further classes of a layer are lighter and darker in turn
const COLOURS = { truth: '#56b4e9', global: '#e69f00', personal: '#cc79a7', box: '#f0e442' };
const DIFFERENCE = { 'found': '#009e73', 'missed': '#56b4e9', 'wrong': '#d55e00' };
const UNKNOWN = '#999999';
const $ = (id) => document.getElementById(id);

const nv = new Niivue({
  dragAndDropEnabled: false, logLevel: 'error', loadingText: '', backColor: [0, 0, 0, 1], crosshairWidthUnit: 'percent', crosshairColor: [1, 1, 1, 0.6],
  isOrientationTextVisible: true, multiplanarForceRender: false, dragModePrimary: CROSSHAIR,
});
let cases = [], shown = null, asked = 0;
// of the image that is shown: its layers by name with their volumes, what was found, what the drawing began with
let layers = new Map(), scores = {}, began = null, percent = null, unsaved = false;

async function ask(path, how) {
  const reply = await fetch(path, how);
  if (reply.ok) return reply;
  let told = '';
  try { told = (await reply.json()).error; } catch { /* no sentence came with it */ }
  throw new Error(told || `The viewer does not answer as expected (${reply.status}). Is it still running?`);
}
const json = async (path) => (await ask(path)).json();
const voxels = async (path, how) => (await ask(path, how)).arrayBuffer();

function say(text, bad = false) {
  $('status').textContent = text;
  $('status').classList.toggle('bad', bad);
}

// Runs something that a person has asked for; what goes wrong is told, and what was chosen meanwhile wins.
async function doing(text, work) {
  const mine = asked;
  say(text);
  try {
    await work();
    if (mine === asked && $('status').textContent === text) say('');
  } catch (error) {
    if (mine === asked) say(error.message, true);
  }
}

function rgb(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

// The colour of the n-th class of a layer, n from 0.
function shade(colour, n) {
  // far enough apart to be told from each other in an outline, or in a fill of 25 %
  const to = n % 2 ? 255 : 0, share = n ? Math.min(n % 2 ? 0.45 + 0.15 * n : 0.3 + 0.1 * n, 0.85) : 0;
  return rgb(colour).map((one) => Math.round(one + (to - one) * share));
}

function coloursOf(name) {
  if (name.startsWith('difference')) return Object.entries(DIFFERENCE).map(([word, colour]) => [word, rgb(colour)]);
  return meanings(COLOURS[name], name === 'truth');
}

// The values of a mask from 1; after the classes the one for what nobody knows, if the site has it.
function meanings(colour, withUnknown = true) {
  const classes = shown.classes.map((word, n) => [word, shade(colour, n)]);
  return withUnknown && shown.unknown ? [...classes, ['unknown', rgb(UNKNOWN)]] : classes;
}

function lut(pairs) {
  const all = [['', [0, 0, 0]], ...pairs];
  const channel = (at) => all.map(([, colour]) => colour[at]);
  return { R: channel(0), G: channel(1), B: channel(2), A: all.map((_, n) => (n ? 255 : 0)),
    I: all.map((_, n) => n), labels: all.map(([word]) => word), min: 0, max: all.length - 1 };
}

function swatches(pairs) {
  const legend = document.createElement('div');
  legend.className = 'legend';
  for (const [word, colour] of pairs) {
    const swatch = document.createElement('span'), one = document.createElement('span');
    swatch.className = 'swatch';
    swatch.style.backgroundColor = `rgb(${colour.join(',')})`;
    one.append(swatch, word);
    legend.append(one);
  }
  return legend;
}

function option(select, value, text) {
  const one = document.createElement('option');
  one.value = value;
  one.textContent = text;
  select.append(one);
}

// ---- the image and its layers

const LABELS = {
  truth: 'Truth', global: 'Global model', personal: 'Personal model',
  'difference-global': 'Global and truth differ', 'difference-personal': 'Personal and truth differ', box: 'Inside the box',
};

function layerNames() {
  const names = shown.truth ? ['truth'] : [];
  names.push(...shown.models);
  if (shown.truth) names.push(...shown.models.map((model) => `difference-${model}`));
  if (shown.boxes) names.push('box');
  return names;
}

async function open(number) {
  asked += 1;
  const mine = asked;
  await doing('Reading the image ...', async () => {
    const about = await json(`case/${number}/about`);
    const image = await voxels(`case/${number}/image`);
    if (mine !== asked) return;
    stopDrawing();
    began = null;
    unsaved = false;
    shown = { ...about, number };
    layers = new Map();
    scores = {};
    percent = null;
    $('canvas').dataset.ready = '';
    nv.closeDrawing();
    while (nv.volumes.length) nv.removeVolume(nv.volumes[nv.volumes.length - 1]);
    nv.setPan2Dxyzmm([0, 0, 0, 1]);
    await nv.addVolumeFromUrl({ url: 'image.nii', name: 'image.nii', buffer: image, colormap: 'gray', trustCalMinMax: true });
    fitPage();
  });
  if (mine !== asked || !shown || shown.number !== number) return;
  for (const name of ['truth', ...[...shown.models].reverse()]) {
    if (mine === asked && layerNames().includes(name)) await look(name, name === 'truth' || name === 'personal');
  }
  if (mine === asked) $('canvas').dataset.ready = 'yes';
}

// Everything in the page that depends on the image.
function fitPage() {
  const flat = shown.kind === 'picture';
  document.title = `${shown.case}: pFedSAM viewer`;
  $('planes').hidden = $('slices').hidden = flat;
  nv.setInterpolation(true);
  nv.opts.isOrientationTextVisible = !flat;
  nv.opts.isSliceMM = false;
  nv.setCrosshairWidth(flat ? 0 : 0.3);
  buttons();
  nv.setSliceType(flat ? AXIAL : Number($('plane').value));
  $('layers').replaceChildren(...layerNames().map(layerLine));
  $('probability').replaceChildren();
  option($('probability'), '', 'off');
  for (const model of [...shown.models].reverse()) {
    shown.classes.forEach((word, n) => option($('probability'), `probability-${model}-${n + 1}`, `${model}: ${word}`));
  }
  $('probabilities').hidden = !shown.models.length;
  fitCorrection();
  fitBox();
  writeScores();
  $('notes').replaceChildren(...notes().map(line));
  moved();
}

// The left button draws where it would move the crosshair; else it moves a picture.
function buttons() {
  const primary = shown.kind === 'picture' && !nv.opts.drawingEnabled ? PAN : CROSSHAIR;
  nv.setMouseEventConfig({ leftButton: { primary }, rightButton: PAN, centerButton: PAN });
}

function notes() {
  const found = Object.values(scores).flatMap((one) => one.remarks);
  const left = shown.steps.some((step) => step > 1)
    ? [`one ${shown.kind === 'picture' ? 'pixel' : 'voxel'} in ${Math.max(...shown.steps)} along an axis is shown; a corrected mask is saved in its full size`] : [];
  return [...new Set([...left, ...shown.notes, ...found])];
}

function line(text) {
  const one = document.createElement('li');
  one.textContent = text;
  return one;
}

function layerLine(name, at) {
  const one = document.createElement('li'), label = document.createElement('label'), box = document.createElement('input');
  const word = document.createElement('span'), key = document.createElement('span');
  box.type = 'checkbox';
  box.id = `layer-${name}`;
  box.addEventListener('change', () => toggle(name, box.checked));
  box.disabled = name === 'box';
  word.textContent = LABELS[name];
  key.className = 'key';
  key.textContent = String(at + 1);
  label.append(box, word, key);
  one.append(label, swatches(coloursOf(name)));
  return one;
}

// Fetches a mask that a person looks at, with its Dice, and shows it or keeps it ready.
async function look(name, on) {
  const number = shown.number;
  await doing(`Waiting for: ${LABELS[name].toLowerCase()} ...`, async () => {
    await add(name, await voxels(`case/${number}/${name}`), on);
    if (name !== 'truth') await score(name);
  });
}

async function score(name) {
  const number = shown.number, found = await json(`case/${number}/found-${name}`);
  if (shown.number !== number) return;
  scores[name] = found;
  writeScores();
  $('notes').replaceChildren(...notes().map(line));
}

async function add(name, buffer, on) {
  const number = shown.number;
  remove(name);
  const volume = await nv.addVolumeFromUrl({ url: `${name}.nii`, name: `${name}.nii`, buffer, opacity: 0 });
  if (!shown || shown.number !== number) { nv.removeVolume(volume); return; }
  volume.setColormapLabel(lut(coloursOf(name)));
  layers.set(name, volume);
  $(`layer-${name}`).disabled = false;
  $(`layer-${name}`).checked = on;
  refresh();
}

function remove(name) {
  if (layers.has(name)) nv.removeVolume(layers.get(name));
  layers.delete(name);
}

async function toggle(name, on) {
  if (on && !layers.has(name)) {
    await doing(`Waiting for: ${LABELS[name].toLowerCase()} ...`,
      async () => add(name, await voxels(`case/${shown.number}/${name}`), true));
  }
  refresh();
}

// Shows the layers that are ticked: their outline, and their area as much as `Fill` says.
function refresh() {
  const share = Number($('fill').value) / 100;
  for (const [name, volume] of layers) {
    const on = $(`layer-${name}`).checked;
    // what is off is taken out: NiiVue draws outlines at full strength
    if (on && !nv.volumes.includes(volume)) nv.addVolume(volume);
    if (!on && nv.volumes.includes(volume)) nv.removeVolume(volume);
    volume.opacity = Math.max(share, 0.004);
  }
  // NiiVue outlines a volume towards the next slices, too: at full strength that would hide small areas
  nv.opts.atlasOutline = shown.kind === 'picture' ? 1 : Math.min(share + 0.35, 1);
  nv.setDrawOpacity(Math.max(share, 0.2));
  nv.updateGLVolume();
}

async function probability(name) {
  if (percent) nv.removeVolume(percent);
  percent = null;
  if (!name) return;
  const number = shown.number;
  await doing('Waiting for the probabilities ...', async () => {
    const buffer = await voxels(`case/${number}/${name}`);
    if (shown.number !== number || $('probability').value !== name) return;
    percent = await nv.addVolumeFromUrl({ url: `${name}.nii`, name: `${name}.nii`, buffer, colormap: 'viridis', opacity: 0.7, cal_min: 1, cal_max: 100 });
    say('Probability: from dark blue, 1 %, over green to yellow, 100 %.');
  });
}

function writeScores() {
  const names = Object.keys(scores);
  if (!names.length) {
    $('scores').textContent = shown.models.length ? 'Not known yet.' : 'No model was given.';
    return;
  }
  const table = document.createElement('table'), head = table.createTHead().insertRow();
  const withTruth = shown.truth;
  head.append(cell('th', withTruth ? 'Class' : 'Found, no truth is known'), ...names.map((name) => cell('th', name)));
  const body = table.createTBody();
  shown.classes.forEach((word, n) => {
    const row = body.insertRow();
    row.append(cell('th', word));
    for (const name of names) {
      const { dice, voxels: count } = scores[name], unit = shown.kind === 'picture' ? 'pixels' : 'voxels';
      const empty = count[n] ? '' : ' (empty)';
      row.append(cell('td', dice ? `${dice[n].toFixed(2)}${empty}` : `${count[n].toLocaleString('en')} ${unit}`));
    }
  });
  $('scores').replaceChildren(table);
}

function cell(kind, text) {
  const one = document.createElement(kind);
  if (kind === 'th') one.scope = 'col';
  one.textContent = text;
  return one;
}

// ---- where we are

function axis() {
  const plane = Number($('plane').value);
  return plane === 1 ? 1 : plane === 2 ? 0 : 2;
}

function voxel() {
  return Array.from(nv.frac2vox(nv.scene.crosshairPos)).map(Math.round);
}

function moved() {
  const at = voxel(), size = shown.shape[axis()];
  $('slice').max = size;
  $('slice').value = at[axis()] + 1;
  $('at').textContent = `${at[axis()] + 1} of ${size}`;
  const here = shown.kind === 'picture' ? '' : `, slice ${at[axis()] + 1} of ${size}`;
  $('canvas').setAttribute('aria-label', `${shown.case}${here}. Keys are listed below.`);
}

function step(by) {
  if (!shown || shown.kind === 'picture') return;
  const move = [0, 0, 0];
  move[axis()] = by;
  nv.moveCrosshairInVox(...move);
  moved();
}

nv.onLocationChange = (where) => {
  if (!shown) return;
  moved();
  const at = Array.from(where.vox).map((one) => Math.round(one) + 1);
  if (shown.kind === 'picture') at.length = 2;
  const values = where.values.slice(0, nv.volumes.length).map((one, n) => {
    const volume = nv.volumes[n];
    if (n === 0) return `value ${Number(one.value.toPrecision(5))}`;
    if (volume === percent) return `probability ${one.value} %`;
    return '';
  });
  $('readout').textContent = [`at ${at.join(', ')}`, ...values].filter(Boolean).join('; ');
};

function zoom(by, x = null, y = null) {
  const [left, top, depth, before] = nv.scene.pan2Dxyzmm;
  const now = Math.min(Math.max(before * by, 1), 40);
  let pan = now === 1 ? [0, 0, 0] : [left, top, depth];
  if (x !== null && now > 1) {
    // what is under the pointer stays there
    const under = mm(x, y);
    nv.setPan2Dxyzmm([...pan, now]);
    const then = mm(x, y);
    if (under && then) pan = pan.map((one, n) => one + then[n] - under[n]);
  }
  nv.setPan2Dxyzmm([...pan, now]);
}

function fraction(x, y) {
  const edge = $('canvas').getBoundingClientRect(), ratio = nv.uiData.dpr;
  const at = nv.canvasPos2frac([(x - edge.left) * ratio, (y - edge.top) * ratio]);
  return at[0] < 0 ? null : Array.from(at);
}

function mm(x, y) {
  const at = fraction(x, y);
  return at && Array.from(nv.frac2mm(at)).slice(0, 3);
}

// ---- a box

let first = null, last = null;

function fitBox() {
  $('box').hidden = !shown.boxes;
  if (!shown.boxes) return;
  $('boxmodel').replaceChildren();
  for (const model of [...shown.models].reverse()) option($('boxmodel'), model, model);
  const flat = shown.kind === 'picture', words = flat ? ['x', 'y'] : ['x', 'y', 'slice'];
  $('corners').replaceChildren(...words.flatMap((word, at) => [`${word} from`, `to`].map((text, end) => {
    const label = document.createElement('label'), input = document.createElement('input');
    Object.assign(input, { type: 'number', min: 1, max: shown.shape[at], id: `corner-${2 * at + end}`, value: end ? shown.shape[at] : 1 });
    input.setAttribute('aria-label', `${word}, ${end ? 'last' : 'first'} ${flat ? 'pixel' : 'voxel'}`);
    label.append(text, ' ', input);
    return label;
  })));
}

function dragging(on) {
  $('drawbox').setAttribute('aria-pressed', String(on));
  $('drag').hidden = !on;
  $('rubber').hidden = true;
  if (on) {
    stopDrawing();
    $('plane').value = String(AXIAL);
    nv.setSliceType(AXIAL);
    moved();
  }
}

$('drag').addEventListener('pointerdown', (event) => {
  first = last = fraction(event.clientX, event.clientY);
  if (!first) return;
  $('drag').setPointerCapture(event.pointerId);
  $('rubber').dataset.x = event.clientX;
  $('rubber').dataset.y = event.clientY;
});
$('drag').addEventListener('pointermove', (event) => {
  if (!first) return;
  last = fraction(event.clientX, event.clientY) || last;
  const edge = $('stage').getBoundingClientRect(), { x, y } = $('rubber').dataset;
  const [x0, x1] = [Number(x), event.clientX].sort((a, b) => a - b), [y0, y1] = [Number(y), event.clientY].sort((a, b) => a - b);
  $('rubber').hidden = false;
  Object.assign($('rubber').style, { left: `${x0 - edge.left}px`, top: `${y0 - edge.top}px`, width: `${x1 - x0}px`, height: `${y1 - y0}px` });
});
$('drag').addEventListener('pointerup', () => {
  if (!first) return;
  const ends = [first, last].map((at) => Array.from(nv.frac2vox(at)).map(Math.round)), slice = voxel()[2];
  first = null;
  [0, 1].forEach((at) => {
    const [from, to] = ends.map((one) => Math.min(Math.max(one[at], 0), shown.shape[at] - 1)).sort((a, b) => a - b);
    $(`corner-${2 * at}`).value = from + 1;
    $(`corner-${2 * at + 1}`).value = to + 1;
  });
  if (shown.kind !== 'picture') $('corner-4').value = $('corner-5').value = slice + 1;
  dragging(false);
  segment();
});

async function segment() {
  const number = shown.number;
  const corners = [0, 1, 2, 3, 4, 5].map((at) => ($(`corner-${at}`) ? Number($(`corner-${at}`).value) - 1 : 0));
  await doing('The model segments inside the box ...', async () => {
    const body = JSON.stringify({ model: $('boxmodel').value, box: corners });
    const buffer = await voxels(`case/${number}/segment`, { method: 'POST', body });
    if (shown.number !== number) return;
    await add('box', buffer, true);
    await score('box');
    startsOf();
  });
}

// ---- a correction

function startsOf() {
  const before = $('start').value;
  $('start').replaceChildren();
  option($('start'), 'empty', 'nothing');
  for (const name of layerNames().filter((one) => !one.startsWith('difference') && (one !== 'box' || layers.has('box')))) {
    option($('start'), name, LABELS[name].toLowerCase());
  }
  const usual = shown.models.length ? 'personal' : shown.truth ? 'truth' : 'empty';
  $('start').value = before && [...$('start').options].some((one) => one.value === before) ? before : usual;
}

// What a person may want to know before a site with values of its own trains on it.
function stored() {
  const told = meanings('#000000').map(([word], n) => `${shown.labels[n + 1] ?? 'no value for'} ${word}`);
  return `Values in the file: ${told.join(', ')}.`;
}

function fitCorrection() {
  $('place').textContent = shown.cannot_save
    ? `A correction cannot be saved: ${shown.cannot_save}`
    : `It becomes the label of this case in its site folder; where there is a label, it goes into the folder corrections beside it. No file is replaced. ${stored()}`;
  $('save').disabled = Boolean(shown.cannot_save);
  $('start').replaceChildren();
  startsOf();
  $('class').replaceChildren();
  meanings('#000000').forEach(([word], n) => option($('class'), n + 1, word));
  option($('class'), 0, 'eraser');
}

function pen() {
  nv.setPenValue(Number($('class').value), $('closed').checked && $('class').value !== '0');
  nv.opts.penSize = Math.min(Math.max(Math.round(Number($('width').value)) || 1, 1), 50);
}

async function draw() {
  if (nv.opts.drawingEnabled) { stopDrawing(); return; }
  const number = shown.number, start = $('start').value;
  if (began !== null && began !== start && !mayLose()) return;
  dragging(false);
  await doing('Preparing the drawing ...', async () => {
    if (began !== start || !nv.drawBitmap) {
      const buffer = await voxels(`case/${number}/${start}`);
      if (shown.number !== number) return;
      nv.createEmptyDrawing();
      // behind the header of NIfTI
      nv.drawBitmap.set(new Uint8Array(buffer, 352));
      nv.drawClearAllUndoBitmaps();
      nv.drawAddUndoBitmap();
      nv.setDrawColormap(lut(meanings('#f0e442')));
      nv.refreshDrawing(true);
      began = start;
    }
    // the mask that is corrected lies under the drawing otherwise
    for (const name of layers.keys()) if (name !== 'truth' || start === 'truth') $(`layer-${name}`).checked = false;
    refresh();
    pen();
    nv.setDrawingEnabled(true);
    buttons();
    $('pen').disabled = false;
    unsaved = true;
    $('draw').setAttribute('aria-pressed', 'true');
  });
}

function stopDrawing() {
  if (nv.opts.drawingEnabled) {
    nv.setDrawingEnabled(false);
    buttons();
  }
  $('pen').disabled = true;
  $('draw').setAttribute('aria-pressed', 'false');
}

function mayLose() {
  return !unsaved || window.confirm('What was drawn is not saved. Go on without it?');
}

async function save() {
  const number = shown.number;
  await doing('Saving ...', async () => {
    const reply = await ask(`case/${number}/save-${began}`, { method: 'POST', body: nv.drawBitmap.slice() });
    const told = await reply.json();
    unsaved = false;
    say(told.as === 'labels' ? `Saved as the label of this case: ${told.saved}`
      : `Saved: ${told.saved}. The case has a label already; to train with the correction, put it in the label's place.`);
  });
}

// ---- what a person does

function sites() {
  return [...new Set(cases.map((one) => one.site))];
}

function listCases() {
  $('case').replaceChildren();
  const groups = new Map();
  for (const one of cases.filter((each) => each.site === $('site').value)) {
    const section = one.section || 'cases';
    if (!groups.has(section)) {
      const group = document.createElement('optgroup');
      group.label = section;
      groups.set(section, group);
      $('case').append(group);
    }
    option(groups.get(section), one.number, one.case);
  }
}

const KEYS = {
  ArrowUp: () => step(1), ArrowDown: () => step(-1), PageUp: () => step(1), PageDown: () => step(-1),
  '+': () => zoom(1.25), '=': () => zoom(1.25), '-': () => zoom(0.8), 0: () => zoom(0),
  '[': () => fill(-10), ']': () => fill(10),
  b: () => shown.boxes && dragging($('drag').hidden), d: draw, u: () => nv.opts.drawingEnabled && nv.drawUndo(),
  Escape: () => { dragging(false); stopDrawing(); },
};

function fill(by) {
  $('fill').value = Number($('fill').value) + by;
  $('filled').textContent = `${$('fill').value} %`;
  refresh();
}

// Before NiiVue, which has keys of its own that the page does not name.
document.addEventListener('keydown', (event) => {
  if (!shown || event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const layer = /^[1-9]$/.test(event.key) && $('layers').children[Number(event.key) - 1]?.querySelector('input');
  if (layer && !layer.disabled) layer.click();
  if (KEYS[event.key]) {
    event.preventDefault();
    KEYS[event.key]();
  }
  if (event.target === $('canvas')) event.stopPropagation();
}, true);
document.addEventListener('keyup', (event) => event.target === $('canvas') && event.stopPropagation(), true);
$('stage').addEventListener('wheel', (event) => {
  if (!shown) return;
  event.preventDefault();
  event.stopPropagation();
  if (shown.kind === 'picture' || event.ctrlKey) zoom(event.deltaY < 0 ? 1.15 : 1 / 1.15, event.clientX, event.clientY);
  else step(event.deltaY < 0 ? 1 : -1);
}, { capture: true, passive: false });
$('slice').addEventListener('input', () => step(Number($('slice').value) - 1 - voxel()[axis()]));
$('plane').addEventListener('change', () => { nv.setSliceType(Number($('plane').value)); moved(); });
$('in').addEventListener('click', () => zoom(1.5));
$('out').addEventListener('click', () => zoom(1 / 1.5));
$('fit').addEventListener('click', () => zoom(0));
$('fill').addEventListener('input', () => fill(0));
$('probability').addEventListener('change', () => probability($('probability').value));
$('drawbox').addEventListener('click', () => dragging($('drag').hidden));
$('segment').addEventListener('click', segment);
$('draw').addEventListener('click', draw);
$('start').addEventListener('change', stopDrawing);
for (const id of ['class', 'width', 'closed']) $(id).addEventListener('change', pen);
$('undo').addEventListener('click', () => nv.drawUndo());
$('save').addEventListener('click', save);
$('site').addEventListener('change', () => {
  if (mayLose()) { listCases(); open(Number($('case').value)); } else $('site').value = cases[shown.number].site;
});
$('case').addEventListener('change', () => {
  if (mayLose()) open(Number($('case').value)); else $('case').value = shown.number;
});
window.addEventListener('beforeunload', (event) => unsaved && event.preventDefault());

async function begin() {
  if (!document.createElement('canvas').getContext('webgl2')) {
    say('This browser has no WebGL 2, which the images are drawn with. Switch on its hardware acceleration, or take another browser.', true);
    return;
  }
  await nv.attachToCanvas($('canvas'));
  cases = await json('cases');
  for (const site of sites()) option($('site'), site, site || '-');
  listCases();
  $('choose').hidden = cases.length < 2;
  await open(cases[0].number);
}

begin().catch((error) => say(error.message, true));
