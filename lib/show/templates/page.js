  var root = document.documentElement;

  // Theme: system, light, dark. Where storage is closed (some file:// pages) it lasts for the visit.
  var button = document.querySelector(".theme"), themes = ["system", "light", "dark"], theme = "system";
  try { theme = localStorage.getItem("workbook-theme") || "system"; } catch (e) { theme = "system"; }
  function show() {
    root.style.colorScheme = theme === "system" ? "" : theme;
    button.textContent = "Theme: " + theme;
  }
  if (button) {
    if (themes.indexOf(theme) < 0) { theme = "system"; }
    button.hidden = false;
    show();
    button.addEventListener("click", function () {
      theme = themes[(themes.indexOf(theme) + 1) % 3];
      try { localStorage.setItem("workbook-theme", theme); } catch (e) { /* lasts for the visit */ }
      show();
    });
  }

  // A page that may lie beside this one is a link only where this file lies in its own folder:
  // mailed alone, the name stays text.
  var folders = location.pathname.split("/");
  document.querySelectorAll("[data-home] [data-page]").forEach(function (name) {
    var here = "", link = document.createElement("a");
    try { here = decodeURIComponent(folders[folders.length - 2] || ""); } catch (e) { here = ""; }
    if (here !== name.closest("[data-home]").getAttribute("data-home")) { return; }
    link.href = name.getAttribute("data-page");
    while (name.firstChild) { link.appendChild(name.firstChild); }
    name.appendChild(link);
  });

  // A number opens what it rests on. One stop of the Tab key a table; arrows move between numbers.
  function details() {
    if (!panel) { return; }

    function line(list, name, content) {
      if (!content) { return; }
      var dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = name;
      dd.append(content);
      list.append(dt, dd);
    }
    function records(ids) {
      var all = document.createElement("span");
      ids.split(" ").filter(Boolean).forEach(function (id) {
        if (!record(id)) { return; }
        var link = document.createElement("a");
        link.href = "#record-" + id;
        link.textContent = id;
        link.addEventListener("click", function () {
          panel.close();
          setTimeout(reveal, 0);
        });
        all.append(all.firstChild ? ", " : "", link);
      });
      return all.firstChild ? all : "";
    }
    function open(control) {
      var cell = control.closest("td"), data = cell.dataset, list = document.createElement("dl");
      var name = cell.parentElement.querySelector("th");
      line(list, "number", (name ? name.textContent + ": " : "") + heading(cell.closest("table"), cell.cellIndex).join(", "));
      line(list, "meaning", meaningOf(heading(cell.closest("table"), cell.cellIndex).join(" ")));
      line(list, "value", data.value);
      line(list, (data.level || "95 %") + " interval", data.low || data.high ? (data.low || "\u2026") + " to " + (data.high || "\u2026") : "none: " + (data.reason || "one reading"));
      line(list, "n", data.n);
      line(list, "method", data.method);
      line(list, "set-up", data.setup);
      line(list, data.records && data.records.indexOf(" ") > 0 ? "records" : "record", records(data.records || ""));
      panel.open(control, "What this number rests on", [list]);
    }
    function step(control, key) {
      var row = control.closest("tr"), at = control.closest("td").cellIndex, along = "nextElementSibling";
      if (key === "ArrowLeft" || key === "ArrowUp") { along = "previousElementSibling"; }
      if (key === "ArrowLeft" || key === "ArrowRight") {
        for (var cell = control.closest("td")[along]; cell; cell = cell[along]) {
          if (cell.querySelector(".open")) { return cell.querySelector(".open"); }
        }
        return null;
      }
      for (row = row[along]; row; row = row[along]) {
        var found = !row.hidden && row.cells[at] && row.cells[at].querySelector(".open");
        if (found) { return found; }
      }
      return null;
    }
    document.querySelectorAll("table.data").forEach(function (table) {
      var stop = null;
      table.querySelectorAll("td[data-n] > .v").forEach(function (shown) {
        var control = document.createElement("button");
        control.type = "button";
        control.className = "v open";
        control.tabIndex = stop ? -1 : 0;
        control.setAttribute("aria-haspopup", "dialog");
        control.append.apply(control, shown.childNodes);
        shown.replaceWith(control);
        stop = stop || control;
      });
      table.addEventListener("click", function (event) {
        var control = event.target.closest(".open");
        if (control) { open(control); }
      });
      table.addEventListener("focusin", function (event) {
        if (!event.target.matches(".open")) { return; }
        stop.tabIndex = -1;
        stop = event.target;
        stop.tabIndex = 0;
      });
      table.addEventListener("keydown", function (event) {
        var next = event.target.matches(".open") && /^Arrow/.test(event.key) && step(event.target, event.key);
        if (next) { event.preventDefault(); next.focus(); }
      });
    });
  }
  details();
  markTerms(document.querySelector("main"));

  // The planner: which measured option serves so many users within the limits. The rules are those
  // of lib/analysis/choice.py; the answer stays in the address.
  function planner(known) {
    var form = document.querySelector("form.planner"), table = document.querySelector("table.plan"), told = document.querySelector(".planned");
    var options = known.options, absent = document.querySelector(".absent");
    var MOST = 100;  // options in the answer
    var verdicts = ["meets", "may meet", "fails", "not measured"], names = ["gb", "context", "users", "ttft", "itl", "usd", "devices"];

    function grouped(x, digits) { return x.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits }); }
    function short(x) {
      var size = Number(x.toPrecision(4));
      if (size >= 1000) { return grouped(x, 0); }
      return size >= 100 ? grouped(x, 1) : size >= 10 ? grouped(x, 2) : size >= 1 ? grouped(x, 3) : String(Number(x.toPrecision(3)));
    }
    function people(n) { return grouped(n, 0) + (n === 1 ? " user" : " users"); }
    function place(cell) { return people(cell.users) + " of " + grouped(cell.context, 0) + " tokens"; }
    function least(items, key) {
      return items.reduce(function (best, x) { return best === null || key(x) < key(best) ? x : best; }, null);
    }
    function left(option, bytes) {
      return option.fit.share * (option.devices * bytes - option.fit.of_bytes) - option.fit.fixed_bytes;
    }
    function room(option, bytes, context) {
      if (!option.fit) { return null; }
      var ends = option.fit.user_bytes, at = 1, tokens = Math.ceil(context / option.fit.block) * option.fit.block;
      while (at < ends.length - 1 && ends[at][0] < tokens) { at += 1; }
      var a = ends[at - 1], b = ends[at], user = a[1] + (b[1] - a[1]) * (tokens - a[0]) / (b[0] - a[0]);
      return Math.floor(Math.max(left(option, Math.round(bytes)), 0) / user);
    }
    function nearest(option, ask) {
      var failed = option.cells.filter(function (c) { return c.fault && c.users <= ask.users && c.context <= ask.context; })[0];
      if (failed) { return failed.fault; }
      var measured = option.cells.filter(function (c) { return c.each !== null; });
      if (!measured.length) { return "no decode throughput"; }
      var most = least(measured, function (c) { return -(c.users * 1e9 + c.context); });
      var longest = least(measured, function (c) { return -(c.context * 1e9 + c.users); });
      return (option.predicted ? "predicted" : "measured") + " up to " + place(most) + (most === longest ? "" : " and " + place(longest));
    }
    function offer(option, ask) {
      var users = room(option, ask.gb * 1e9, ask.context);
      var cell = least(option.cells.filter(function (c) {
        return c.each !== null && c.context >= ask.context && c.users >= ask.users;
      }), function (c) { return c.users * 1e9 + c.context; });
      var total = cell ? ask.users * cell.each : null;
      var sure = cell ? ask.users * (option.predicted ? cell.each_ends[0] : cell.each) : 0;
      var found = { option: option, verdict: "meets", why: "", room: users, cell: cell, total: total, sure: sure, held: false };
      found.price = total && ask.usd ? option.devices * ask.usd / 3600 / total * 1e6 : null;
      function end(verdict, why) { found.verdict = verdict; found.why = why; return found; }
      function held(why) { found.held = true; return end("fails", why); }
      if (option.devices > ask.devices) { return held("needs " + option.devices + " GPUs (" + ask.devices + " asked)"); }
      if (option.limit && ask.context > option.limit) {
        return held(grouped(ask.context, 0) + " tokens > " + grouped(option.limit, 0) + " of the model");
      }
      if (users !== null && users < ask.users) {
        var lack = -left(option, ask.gb * 1e9);
        if (lack > 0) { return held("weights are " + grouped(lack / 1e9, 1) + " GB too large"); }
        return held("room for " + people(users) + " (" + grouped(ask.users, 0) + " asked)");
      }
      var limits = limitsOf(ask);
      var answers = limits.map(function (x) { return limited(option, ask, cell, x[0], x[1], x[2]); });
      if (!limits.length) { answers = cell ? [["meets", ""]] : [["not measured", nearest(option, ask)]]; }
      var worse = ["meets", "may meet", "not measured", "fails"];
      var worst = least(answers, function (x) { return -worse.indexOf(x[0]); });
      return end(worst[0], worst[1]);
    }
    function limitsOf(ask) {
      return [["TTFT", ask.ttft, "ttft_ms"], ["a token takes", ask.itl, "each"]].filter(function (x) { return x[1]; });
    }
    function timeOf(c, name) { return name === "each" ? 1e3 / c.each : c.ttft_ms; }
    function ofCard(ask) {
      return options.filter(function (option) { return ask.gpu ? option.gpu === ask.gpu : !option.predicted; });
    }
    function silent(x) { return x.verdict === "not measured" && !x.cell && x.why.indexOf("failed at ") !== 0; }
    function beside(offers, x) {
      return offers.filter(function (y) {
        return x.option.predicted !== y.option.predicted && y.option.model === x.option.model && y.option.engine === x.option.engine;
      });
    }
    function offersOf(ask) {
      var offers = ofCard(ask).map(function (option) { return offer(option, ask); });
      function stands(x) {
        var mine = beside(offers, x);
        return mine.every(silent) && !(mine.length && silent(x));
      }
      var kept = offers.filter(function (x) {
        return x.option.predicted ? stands(x) : !beside(offers, x).some(stands);
      });
      kept.filter(function (x) { return x.option.predicted; }).forEach(function (x) {
        var whys = [x].concat(beside(offers, x)).map(function (y) { return y.why; });
        x.why = whys.filter(function (why, i) { return why && whys.indexOf(why) === i; }).join("; ");
      });
      return kept;
    }
    function instead(ask) {
      var choices = ofCard(ask);
      function serves(other) {
        return offersOf(Object.assign({}, ask, other)).some(function (x) { return x.verdict === "meets" || x.verdict === "may meet"; });
      }
      function fewer(name) {
        var values = [];
        choices.forEach(function (option) {
          option.cells.forEach(function (c) { if (c.each !== null && c[name] < ask[name]) { values.push(c[name]); } });
        });
        return values.filter(function (n, i) { return values.indexOf(n) === i; }).sort(function (a, b) { return b - a; });
      }
      if (serves({})) { return []; }
      var contexts = fewer("context"), users = fewer("users"), places = [];
      var short = contexts.filter(function (n) { return serves({ context: n }); })[0];
      var few = users.filter(function (n) { return serves({ users: n }); })[0];
      if (short) { places.push({ users: ask.users, context: short }); }
      if (few) { places.push({ users: few, context: ask.context }); }
      if (!places.length) {
        users.some(function (n) {
          var both = contexts.filter(function (m) { return serves({ users: n, context: m }); })[0];
          if (both) { places.push({ users: n, context: both }); }
          return both;
        });
      }
      var near = places.map(place), gpus = choices.map(function (option) { return option.devices; }).filter(function (n) {
        return n > ask.devices && serves({ devices: n });
      });
      if (gpus.length) { near.push(Math.min.apply(null, gpus) + " GPUs (DEVICES)"); }
      if (!ask.gpu && serves({ gb: 1e6 })) { near.push("more memory (GPU_GB)"); }
      return near;
    }
    function wider(offers, ask) {
      var limits = limitsOf(ask);
      if (!limits.length) { return ""; }
      function times(x) { return limits.map(function (limit) { return timeOf(x.cell, limit[2]); }); }
      var near = least(offers.filter(function (x) {
        return x.cell && !x.held && times(x).indexOf(null) < 0;
      }), function (x) {
        return Math.max.apply(null, times(x).map(function (ms, i) { return ms / limits[i][1]; }));
      });
      return "wider limits" + (near ? ": " + near.option.model + " on " + near.option.on + " has " + times(near).map(function (ms, i) {
        return limits[i][0] + " " + short(ms) + " ms";
      }).join(" and ") : "");
    }
    function limited(option, ask, cell, what, limit, name) {
      function time(c) { return timeOf(c, name); }
      function ends(c) {
        if (!c[name + "_ends"]) { return [time(c), time(c)]; }
        return name === "each" ? [1e3 / c.each_ends[1], 1e3 / c.each_ends[0]] : c.ttft_ms_ends;
      }
      var sure = least(option.cells.filter(function (c) {
        return c.each !== null && c[name] !== null && c.context <= ask.context && c.users <= ask.users && ends(c)[0] > limit;
      }), function (c) { return -(c.users * 1e9 + c.context); });
      if (sure) { return ["fails", what + " " + short(time(sure)) + " ms > " + limit + (sure === cell ? "" : " at " + place(sure))]; }
      if (!cell) { return ["not measured", nearest(option, ask)]; }
      if (cell[name] === null) {
        return ["not measured", what + " at " + people(cell.users) + " is not " + (option.predicted ? "predicted" : "measured")];
      }
      if (ends(cell)[0] > limit) {
        return ["not measured", what + " " + short(time(cell)) + " ms > " + limit + " at more than was asked"];
      }
      if (ends(cell)[1] > limit) { return ["may meet", what + " " + short(ends(cell)[0]) + " to " + short(ends(cell)[1]) + " ms, " + limit + " asked"]; }
      return ["meets", ""];
    }
    function lead(offers, ask) {
      var what = place(ask), counts = {}, first = offers[0];
      if (!first) { return "Nothing is known of " + what + " on " + (ask.gpu || "this card") + "."; }
      verdicts.forEach(function (verdict) {
        counts[verdict] = offers.filter(function (x) { return x.verdict === verdict; }).length;
      });
      var of = offers.length + " option" + (offers.length > 1 ? "s" : "");
      if (first.verdict === "meets" || first.verdict === "may meet") {
        return first.option.model + " on " + first.option.on + (first.verdict === "meets" ? " serves most" : " may serve") + " for " + what +
          ": " + short(first.total) + " tok/s" + (ask.users > 1 ? " together" : "") + (first.option.predicted ? ", predicted" : "") + ". " + counts.meets + " of " + of + (counts.meets === 1 ? " meets" : " meet") + " the limits.";
      }
      var near = instead(ask), more = wider(offers, ask), remedy = [near.join(" or ") || "other numbers", more].filter(Boolean).join(", or ");
      var looser = near.length || !more ? [] : instead(Object.assign({}, ask, { ttft: 0, itl: 0 }));
      if (looser.length) { remedy = looser.join(" or ") + " with " + more; }
      if (counts["not measured"] && !ask.gpu) { remedy += "; or name a card (GPU), and what was not measured is predicted"; }
      return "None of " + of + " is known to serve " + what + ": " + counts.fails + " fail, " + counts["not measured"] + " lack a " +
        (ask.gpu ? "prediction" : "measurement") + ". Ask for " + remedy + ".";
    }
    function cellOf(row, tag, css, text, small) {
      var cell = document.createElement(tag);
      cell.className = css;
      cell.textContent = text;
      if (tag === "th") { cell.scope = "row"; }
      if (small) {
        var more = document.createElement("span");
        more.className = "ci";
        more.textContent = small;
        cell.append(" ", more);
      }
      row.append(cell);
    }
    function answer() {
      var ask = {};
      names.forEach(function (name) { ask[name] = Number(form.elements[name].value) || 0; });
      var bad = form.querySelector(":invalid");
      table.hidden = Boolean(bad);
      absent.textContent = known.absent[form.elements.gpu.value] || "";
      absent.hidden = Boolean(bad) || !absent.textContent;
      if (bad) {
        told.textContent = "No answer: " + bad.parentNode.firstChild.textContent.trim() + " needs a " + (bad.step === "1" ? "whole " : "") + "number above 0.";
        return;
      }
      ask.gpu = form.elements.gpu.value;
      var offers = offersOf(ask);
      offers.sort(function (a, b) {
        return verdicts.indexOf(a.verdict) - verdicts.indexOf(b.verdict) || b.sure - a.sure;
      });
      table.tBodies[0].replaceChildren.apply(table.tBodies[0], offers.slice(0, MOST).map(function (x) {
        var row = document.createElement("tr"), basis = x.cell ? "measured at " + place(x.cell) : "";
        if (x.cell && x.option.predicted) {
          basis = "predicted at " + place(x.cell) + ": " + short(x.cell.each_ends[0]) + " to " + short(x.cell.each_ends[1]) + " tok/s each at 90%" + (x.cell.note ? ", " + x.cell.note : "");
        }
        var sign = { meets: "holds", fails: "fails" }[x.verdict] || "";
        function number(value, digits) { return value === null ? "\u2013" : digits === undefined ? short(value) : grouped(value, digits); }
        cellOf(row, "th", "", x.option.model);
        cellOf(row, "td", "text", x.option.on);
        cellOf(row, "td", "text long verdict " + sign, x.verdict, [x.why, basis].filter(Boolean).join("; "));
        cellOf(row, "td", "num", number(x.room, 0));
        cellOf(row, "td", "num", number(x.cell ? x.cell.ttft_ms : null));
        cellOf(row, "td", "num", number(x.cell ? x.cell.each : null));
        cellOf(row, "td", "num", number(x.total));
        cellOf(row, "td", "num", number(x.price, 2));
        return row;
      }));
      if (offers.length > MOST) {
        var rest = document.createElement("tr");
        cellOf(rest, "th", "", "and " + (offers.length - MOST) + " more options");
        table.tBodies[0].append(rest);
      }
      told.textContent = lead(offers, ask);
    }
    function keep() {
      var given = names.concat("gpu").map(function (name) { return name + "=" + encodeURIComponent(form.elements[name].value); });
      try { history.replaceState(null, "", "#plan?" + given.join("&")); } catch (e) { /* the address stays */ }
    }
    var cards = form.elements.gpu;
    options.forEach(function (option) {
      var listed = Array.prototype.some.call(cards.options, function (card) { return card.value === option.gpu; });
      if (listed || !(option.predicted || option.apart)) { return; }
      cards.add(new Option(option.gpu, option.gpu));
      cards.parentNode.hidden = false;
    });
    cards.addEventListener("input", function () {
      var card = options.filter(function (option) { return option.gpu === cards.value && option.gb; })[0];
      form.elements.gb.value = card ? card.gb : form.elements.gb.defaultValue;
    });
    form.elements.devices.value = Math.min.apply(null, options.map(function (option) { return option.devices; }));
    form.elements.devices.parentNode.hidden = !options.some(function (option) { return option.devices > 1; });
    var asked = location.hash.split("?");
    if (asked[0] === "#plan" && asked[1]) {
      new URLSearchParams(asked[1]).forEach(function (value, name) {
        if (names.indexOf(name) >= 0 || name === "gpu") { form.elements[name].value = value; }
      });
    }
    form.hidden = false;
    form.addEventListener("submit", function (event) { event.preventDefault(); });
    form.addEventListener("input", function () { answer(); keep(); });
    answer();
  }
  var packedOptions = document.getElementById("options");
  if (packedOptions && window.DecompressionStream) {
    unpacked(packedOptions.textContent).then(function (text) { planner(JSON.parse(text)); });
  } else if (packedOptions) {
    document.querySelector(".planned").textContent = "This browser is too old for the planner; make plan answers the same in a terminal.";
  }

  // Contents start closed on a narrow screen; a link into a closed part opens it.
  var toc = document.querySelector(".toc > details");
  if (toc && window.matchMedia("(max-width: 65.99rem)").matches) { toc.open = false; }
  function reveal() {
    var target = null, name = "";
    try { name = decodeURIComponent(location.hash.slice(1).split("?")[0]); } catch (e) { /* no link of ours */ }
    if (name.indexOf("record-") === 0) { showRecord(name.slice(7)); }
    target = document.getElementById(name);
    for (var at = target; at; at = at.parentElement) { if (at.tagName === "DETAILS") { at.open = true; } }
    if (target) { target.scrollIntoView(); }
  }
  window.addEventListener("hashchange", reveal);
  reveal();
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details:not(.code, .raw, .job, .clip)").forEach(function (d) { d.open = true; });
  });
