(function () {
  'use strict';
  var graph = JSON.parse(document.getElementById('graph').textContent);
  var svg = document.getElementById('circuit'), panel = document.getElementById('panel'), tip = document.getElementById('tip');
  var slider = document.getElementById('count'), number = document.getElementById('number'), said = document.getElementById('said');
  var space = svg.namespaceURI, most = 40, listed = 12, lettered = 150;
  var total = graph.edges.length, sum = graph.edges.reduce(function (held, edge) { return held + edge.weight; }, 0);
  var largest = total ? graph.edges[0].weight || 1 : 1, count = graph.count, chosen = -1;
  var asked = {};
  location.hash.slice(1).split('&').forEach(function (part) {
    var at = part.indexOf('=');
    if (at > 0) { try { asked[part.slice(0, at)] = decodeURIComponent(part.slice(at + 1)); } catch (error) { /* no address */ } }
  });

  var right = graph.columns.reduce(function (far, one) { return Math.max(far, one.right); }, 0);
  var chart = document.getElementById('chart');
  var across = Math.min(Math.max((Math.max(chart.clientWidth, 500) - 60) / (right + 2.2), 20), 120);
  var up = Math.min(Math.max((window.innerHeight - 190) / (graph.height + 2.2), 26), 96);
  var width = across * (right + 2.2), height = up * (graph.height + 2.1);
  function X(x) { return across * (x + 1.3); }
  function Y(y) { return height - up * (y + 0.75); }
  svg.setAttribute('viewBox', '0 0 ' + width + ' ' + height);
  svg.setAttribute('width', width);
  svg.setAttribute('height', height);

  function make(parent, name, attributes, text) {
    var made = document.createElementNS(space, name);
    Object.keys(attributes || {}).forEach(function (key) { made.setAttribute(key, attributes[key]); });
    if (text !== undefined) { made.textContent = text; }
    parent.appendChild(made);
    return made;
  }
  function put(parent, name, text, className) {
    var made = document.createElement(name);
    if (text !== undefined) { made.textContent = text; }
    if (className) { made.className = className; }
    parent.appendChild(made);
    return made;
  }
  function digits(value) { return Number(value.toPrecision(3)).toString().replace('-', '\u2212'); }
  function signed(value) { return (value > 0 ? '+' : '') + digits(value); }
  function grouped(value) { return String(value).replace(/\B(?=(\d{3})+$)/g, ','); }
  function percent(share) {
    if (share > 0.995 && share < 1 - 1e-6) { return 'more than 99%'; }
    return share > 0 && share < 0.005 ? 'less than 1%' : Math.round(100 * share) + '%';
  }
  function scored(edge) { return signed(edge.score) + (edge.n > 1 ? ' \u00b1 ' + digits(edge.se) : ''); }
  function wordsOf(edge, link) {
    var lines = [graph.nodes[edge.from].name + ' \u2192 ' + graph.nodes[edge.to].name + (edge.slot === 'in' ? '' : ' (' + edge.slot + ')')];
    lines.push(link ? 'no score of its own' : 'score ' + scored(edge) + (graph.units ? ' ' + graph.units : ''));
    if (edge.ci_high >= edge.ci_low) { lines.push('interval ' + digits(edge.ci_low) + ' to ' + digits(edge.ci_high)); }
    if (edge.inclusion >= 0) { lines.push('in ' + percent(edge.inclusion) + ' of bootstrapped circuits'); }
    if (edge.verified) { lines.push('\u2713 verified by intervention: ' + signed(edge.effect_verified)); }
    return lines.join('\n');
  }
  function hint(element, words) {
    element.addEventListener('mousemove', function (event) {
      tip.textContent = words();
      tip.hidden = false;
      tip.style.left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8) + 'px';
      tip.style.top = Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8) + 'px';
    });
    element.addEventListener('mouseleave', function () { tip.hidden = true; });
  }

  var entering = graph.nodes.map(function () { return []; }), leaving = graph.nodes.map(function () { return []; });
  graph.edges.forEach(function (edge, at) { edge.at = at; leaving[edge.from].push(edge); entering[edge.to].push(edge); });

  graph.columns.forEach(function (column) {
    var left = X(column.left - 0.6), top = Y(graph.height + 0.65);
    make(svg, 'rect', { 'class': 'band', x: left, y: top, width: X(column.right + 0.6) - left, height: Y(-0.62) - top, rx: 8 });
    make(svg, 'text', { 'class': 'tower', x: X((column.left + column.right) / 2), y: top - 7 }, column.tower);
    column.rows.forEach(function (row) { make(svg, 'text', { 'class': 'row', x: left - 3, y: Y(row[0]) + 3 }, row[1]); });
  });
  var lines = make(svg, 'g'), dots = make(svg, 'g'), radius = Math.max(Math.min(across / 5, up / 5, 8), 3.5);

  function drawn(edge, link) {
    var group = make(lines, 'g', { 'class': 'edge ' + (link ? 'link' : edge.score < 0 ? 'against' : 'for') });
    var order = ['q', 'k', 'v'].indexOf(edge.slot), head = order >= 0 && !link;
    var port = head ? (order - 1) * radius * 1.1 : 0, same = graph.nodes[edge.from].tower === graph.nodes[edge.to].tower;
    var points = edge.line.map(function (corner) { return [X(corner[0]), Y(corner[1])]; });
    if (head) { points[3] = [points[3][0] + port, points[3][1] + radius * 0.8]; points[2] = [points[2][0] + (same ? port : 0), points[2][1] + (same ? 0 : radius)]; }
    var shape = 'M' + points[0] + 'C' + points[1] + ' ' + points[2] + ' ' + points[3], strength = link ? 0 : edge.weight / largest;
    make(group, 'path', { 'class': 'seen', d: shape, 'stroke-width': link ? 0.8 : 0.7 + 6.5 * strength, 'stroke-opacity': link ? 0.8 : 0.35 + 0.6 * Math.sqrt(strength) });
    var hit = make(group, 'path', { 'class': 'hit', d: shape, 'stroke-width': 9 });
    hint(hit, function () { return wordsOf(edge, link); });
    hit.addEventListener('click', function (event) { event.stopPropagation(); choose(edge.to); });
    if (head && (count <= lettered || chosen === edge.to)) { make(group, 'text', { 'class': 'slot', x: points[3][0] + (order - 1) * 2, y: points[3][1] + 10 }, edge.slot); }
    if (edge.verified) {
      var middle = [0, 1].map(function (axis) { return (points[0][axis] + 3 * points[1][axis] + 3 * points[2][axis] + points[3][axis]) / 8; });
      var tick = make(group, 'g', { 'class': 'tick' });
      make(tick, 'circle', { cx: middle[0], cy: middle[1], r: 6 });
      make(tick, 'text', { x: middle[0], y: middle[1] + 3 }, '\u2713');
    }
    if (chosen === edge.from || chosen === edge.to) { group.classList.add('mine'); }
    return group;
  }

  var discs = graph.nodes.map(function (node, at) {
    var group = make(dots, 'g', { 'class': 'node idle', tabindex: -1, role: 'button', 'aria-label': node.name }), x = X(node.x), y = Y(node.y);
    make(group, 'circle', { 'class': 'area', cx: x, cy: y, r: radius + 3 });
    var square = node.kind === 'mlp' || node.kind === 'neuron';
    var dot = make(group, square ? 'rect' : 'circle', { 'class': 'dot' }), eye = null;
    if (node.id in graph.attention) { group.classList.add('looks'); eye = make(group, 'circle', { 'class': 'eye', cx: x, cy: y }); }
    var beside = node.kind === 'kv_head';
    var name = make(group, 'text', beside ? { x: x + radius + 3, y: y + 3, 'class': 'beside' } : { x: x, y: y - radius - 4 }, node.short);
    hint(group, function () {
      var held = [node.name, node.id + (node.label && node.label !== node.name && node.label !== node.id ? ' \u00b7 ' + node.label : ''), 'score ' + signed(node.score)];
      [['in', entering[at]], ['out', leaving[at]]].forEach(function (side) {
        var best = side[1][0];
        held.push(side[0] + ': ' + grouped(side[1].length) + ' edge' + (side[1].length === 1 ? '' : 's') +
          (best ? ', strongest ' + graph.nodes[side[0] === 'in' ? best.from : best.to].name + ' ' + scored(best) : ''));
      });
      return held.join('\n');
    });
    group.addEventListener('click', function (event) { event.stopPropagation(); choose(chosen === at ? -1 : at); });
    group.addEventListener('keydown', function (event) { if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); choose(at); } });
    return {
      group: group,
      look: function (touched) {
        var size = touched ? radius : Math.max(radius * 0.45, 1.8);
        group.classList.toggle('idle', !touched);
        group.setAttribute('tabindex', touched ? 0 : -1);
        name.style.display = touched ? '' : 'none';
        if (eye) { eye.setAttribute('r', size * 0.4); }
        if (square) { [['x', x - size], ['y', y - size], ['width', 2 * size], ['height', 2 * size]].forEach(function (one) { dot.setAttribute(one[0], one[1]); }); }
        else { [['cx', x], ['cy', y], ['r', size]].forEach(function (one) { dot.setAttribute(one[0], one[1]); }); }
      }
    };
  });

  function paint() {
    while (lines.firstChild) { lines.removeChild(lines.firstChild); }
    var shown = graph.edges.slice(0, count), reached = {}, left = {}, touched = {}, held = 0;
    shown.forEach(function (edge) { left[edge.from] = reached[edge.to] = touched[edge.from] = touched[edge.to] = true; held += edge.weight; });
    var more = [];
    if (chosen >= 0) {
      more = entering[chosen].concat(leaving[chosen]).filter(function (edge) { return edge.at >= count && edge.weight > 0; });
      more = more.sort(function (a, b) { return a.at - b.at; }).slice(0, most);
      more.forEach(function (edge) { left[edge.from] = reached[edge.to] = touched[edge.from] = touched[edge.to] = true; });
      touched[chosen] = true;
    }
    graph.links.forEach(function (edge) { if (reached[edge.from] && left[edge.to]) { drawn(edge, true); } });
    shown.concat(more).reverse().forEach(function (edge) { drawn(edge, false); });
    var mine = {};
    shown.concat(more).forEach(function (edge) { if (chosen === edge.from || chosen === edge.to) { mine[edge.from] = mine[edge.to] = true; } });
    mine[chosen] = true;
    discs.forEach(function (disc, at) {
      disc.look(!!touched[at]);
      disc.group.classList.toggle('mine', !!mine[at]);
      disc.group.classList.toggle('chosen', at === chosen);
    });
    svg.classList.toggle('picked', chosen >= 0);
    said.textContent = grouped(count) + ' of ' + grouped(total) + ' edges' + (sum > 0 ? ' drawn: ' + percent(held / sum) + ' of all |score|' : '');
    number.value = count;
    slider.value = total > 1 ? Math.round(1000 * Math.log(Math.max(count, 1)) / Math.log(total)) : 1000;
    describe();
  }
  function describe() {
    panel.textContent = '';
    if (chosen < 0) {
      put(panel, 'p', Object.keys(graph.attention).length ? 'Click a head (a ring) for its attention over the image and its edges.' : 'Click a node for its edges.');
      var about = put(panel, 'details');
      put(about, 'summary', 'Where these numbers come from');
      var rows = put(about, 'table');
      Object.keys(graph.about).forEach(function (key) { var row = put(rows, 'tr'); put(row, 'td', key); put(row, 'td', String(graph.about[key])).style.whiteSpace = 'normal'; });
      return;
    }
    var node = graph.nodes[chosen];
    put(panel, 'h2', node.name);
    put(panel, 'p', node.id + ', score ' + signed(node.score));
    if (node.id in graph.attention) { look(node, graph.attention[node.id]); }
    [['in', entering[chosen]], ['out', leaving[chosen]]].forEach(function (side) {
      var strong = side[1].filter(function (edge) { return edge.weight > 0; });
      put(panel, 'h3', side[0] + ': ' + grouped(side[1].length) + (strong.length > listed ? ', the strongest ' + listed : ''));
      var rows = put(panel, 'table');
      strong.slice(0, listed).forEach(function (edge) {
        var other = side[0] === 'in' ? edge.from : edge.to, row = put(rows, 'tr');
        put(row, 'td', graph.nodes[other].name + (edge.slot === 'in' ? '' : ' (' + edge.slot + ')') + (edge.verified ? ' \u2713' : ''));
        put(row, 'td', scored(edge));
        row.addEventListener('click', function () { choose(other); });
      });
    });
  }
  function look(node, map) {
    var query = graph.queries[node.tower];
    put(panel, 'h3', percent(map.sum) + ' of its attention is on this image' + (query && query !== 'default' ? ' (query: ' + query + ')' : ''));
    var canvas = put(panel, 'canvas'), ink = canvas.getContext('2d'), levels = atob(map.levels);
    canvas.setAttribute('aria-label', 'attention of ' + node.name);
    canvas.width = 528;
    canvas.height = Math.round(528 * map.rows / map.columns);
    function cells() {
      var high = canvas.height * map.extent[0] / map.rows, wide = canvas.width * map.extent[1] / map.columns;
      for (var at = 0; at < levels.length; at++) {
        var level = levels.charCodeAt(at) / 255, row = Math.floor(at / map.columns), column = at % map.columns;
        ink.fillStyle = 'rgba(208,63,8,' + (0.88 * level).toFixed(3) + ')';
        ink.fillRect(column * wide, row * high, wide + 0.5, high + 0.5);
      }
    }
    if (graph.picture) {
      var image = new Image();
      image.onload = function () {
        canvas.height = Math.round(528 * image.height / image.width);
        ink.imageSmoothingEnabled = image.width > 300;
        ink.filter = 'grayscale(1) brightness(.8)';
        ink.drawImage(image, 0, 0, canvas.width, canvas.height);
        ink.filter = 'none';
        cells();
      };
      image.src = graph.picture;
      var plain = put(panel, 'img');
      plain.alt = 'the image';
      plain.src = graph.picture;
    } else { cells(); }
    put(panel, 'p', 'full colour: ' + digits(100 * map.largest) + '% on one patch');
  }
  function choose(at) { chosen = at; tip.hidden = true; paint(); }
  function show(value) { count = Math.max(Math.min(Math.round(value) || 0, total), total ? 1 : 0); paint(); }

  slider.addEventListener('input', function () { show(Math.exp(Math.log(Math.max(total, 1)) * slider.value / 1000)); });
  number.max = total;
  number.addEventListener('change', function () { show(Number(number.value)); });
  svg.addEventListener('click', function () { if (chosen >= 0) { choose(-1); } });
  document.addEventListener('keydown', function (event) { if (event.key === 'Escape') { choose(-1); } });
  document.getElementById('theme').addEventListener('click', function () {
    var root = document.documentElement, now = root.dataset.theme || (window.matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light');
    root.dataset.theme = now === 'dark' ? 'light' : 'dark';
  });
  var legend = document.getElementById('legend'), verified = graph.edges.filter(function (edge) { return edge.verified; }).length;
  [['--for', 'score above 0'], ['--against', 'below 0']].forEach(function (one) {
    var entry = put(legend, 'span');
    put(entry, 'i').style.background = 'var(' + one[0] + ')';
    entry.appendChild(document.createTextNode(one[1]));
  });
  put(legend, 'span', graph.sign);
  put(legend, 'span', '\u25cf head  \u25a0 MLP  q k v: the slot an edge arrives at');
  put(legend, 'span', verified ? '\u2713 verified by intervention: ' + grouped(verified) : 'no edge verified by intervention');
  if (asked.theme === 'dark' || asked.theme === 'light') { document.documentElement.dataset.theme = asked.theme; }
  if (asked.n) { count = Math.max(Math.min(parseInt(asked.n, 10) || count, total), total ? 1 : 0); }
  if (asked.node) { graph.nodes.forEach(function (node, at) { if (node.id === asked.node) { chosen = at; } }); }
  paint();
})();
