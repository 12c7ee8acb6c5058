  // What a table header says of a column, from its group down: "TTFT ms" without one.
  function heading(table, column) {
    var above = 0, names = [], rows = table.tHead.rows;
    Array.prototype.some.call(rows[0].cells, function (th) {
      above += th.colSpan;
      return above > column && names.push(th.textContent);
    });
    var own = rows.length > 1 && table.querySelector('th[data-col="' + column + '"]');
    return names.concat(own ? own.textContent : []);
  }

  // What most numbers of a column share stands in its header; a number without a tooltip has it too.
  document.querySelectorAll("table.data th[title][data-col]").forEach(function (th) {
    Array.prototype.forEach.call(th.closest("table").tBodies[0].rows, function (row) {
      var cell = row.cells[th.getAttribute("data-col")];
      if (!cell || cell.title || !cell.matches("td.num:not(.missing)")) { return; }
      cell.title = th.title;
      ["level", "method", "setup", "reason"].forEach(function (name) {
        if (th.dataset[name]) { cell.dataset[name] = th.dataset[name]; }
      });
    });
  });

  // Sorting: a button in each sortable header; numbers by data-value, or by what stands before the
  // interval; what is missing comes last.
  function value(row, column) {
    var cell = row.cells[column];
    if (!cell) { return ""; }
    if (cell.hasAttribute("data-value")) { return cell.getAttribute("data-value"); }
    return (cell.matches("td.num") && cell.firstChild || cell).textContent.trim();
  }
  function number(text) {
    var plain = text.replace(/,/g, "").replace(/[\u2212\u2013]/g, "-");
    return plain !== "" && isFinite(plain) ? Number(plain) : null;
  }
  function missing(text) { return /^(|-|\u2013|\u2014|None|nan)$/i.test(text); }
  function compare(a, b) {
    var x = number(a), y = number(b);
    if (x !== null && y !== null) { return x - y; }
    if (x !== null || y !== null) { return x !== null ? -1 : 1; }
    return a.localeCompare(b);
  }
  function sort(table, header) {
    var column = Number(header.getAttribute("data-col"));
    var down = header.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th[aria-sort]").forEach(function (th) { th.removeAttribute("aria-sort"); });
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    var rows = Array.prototype.slice.call(table.tBodies[0].rows);
    rows.sort(function (r, s) {
      var a = value(r, column), b = value(s, column);
      if (missing(a) || missing(b)) { return missing(a) - missing(b); }
      return down ? compare(b, a) : compare(a, b);
    });
    rows.forEach(function (row) { table.tBodies[0].appendChild(row); });
  }
  document.querySelectorAll("table.sortable").forEach(function (table) {
    if (!table.tBodies.length || table.tBodies[0].rows.length < 2) { return; }
    table.querySelectorAll("th[data-col]").forEach(function (th) {
      var control = document.createElement("button");
      control.type = "button";
      control.className = "sort";
      while (th.firstChild) { control.appendChild(th.firstChild); }
      th.appendChild(control);
      control.addEventListener("click", function () { sort(table, th); });
    });
  });

  // Filtering: long tables get a field; a row stays if it holds every word.
  document.querySelectorAll("table.sortable").forEach(function (table) {
    var body = table.tBodies[0], rows = body ? Array.prototype.slice.call(body.rows) : [];
    var region = table.closest(".scroll");
    if (rows.length < 8 || !region) { return; }
    var box = document.createElement("p"), field = document.createElement("input");
    var count = document.createElement("span");
    var names = table.getAttribute("aria-labelledby") || region.getAttribute("aria-labelledby");
    var caption = names && document.getElementById(names);
    var title = caption ? (caption.querySelector("b") || caption).textContent : region.getAttribute("aria-label");
    box.className = "filter";
    field.type = "search";
    field.placeholder = "Filter rows";
    field.autocomplete = "off";
    field.setAttribute("aria-label", "Filter rows: " + title);
    count.setAttribute("role", "status");
    box.append(field, count);
    region.before(box);
    field.addEventListener("input", function () {
      var words = field.value.toLowerCase().split(/\s+/).filter(Boolean), left = 0;
      rows.forEach(function (row) {
        var text = row.textContent.toLowerCase();
        text += " " + text.replace(/(\d),(?=\d{3})/g, "$1");
        row.hidden = !words.every(function (word) { return text.indexOf(word) >= 0; });
        left += row.hidden ? 0 : 1;
      });
      count.textContent = words.length ? left + " of " + rows.length + " rows" : "";
    });
  });

  // Wide tables show their first columns, of groups whole ones; a button shows the rest.
  var COLUMNS = 8;
  function firstColumns(head) {
    var places = 0, leaves = 0, columns = 0;
    Array.prototype.every.call(head[0].cells, function (th) {
      if (places > 1 && columns + th.colSpan > COLUMNS) { return false; }
      columns += th.colSpan;
      leaves += th.scope === "colgroup" ? th.colSpan : 0;
      places += 1;
      return true;
    });
    return { columns: columns, heads: [places, leaves] };
  }
  document.querySelectorAll("table.sortable").forEach(function (table) {
    var region = table.closest(".scroll"), head = table.tHead && table.tHead.rows;
    if (!region || !head || !table.tBodies[0].rows.length) { return; }
    var total = table.tBodies[0].rows[0].cells.length, first = firstColumns(head);
    if (total <= COLUMNS || first.columns >= total) { return; }
    var box = document.createElement("p"), control = document.createElement("button");
    Array.prototype.forEach.call(table.rows, function (row) {
      var kept = row.parentElement === table.tHead ? first.heads[row.rowIndex] : first.columns;
      Array.prototype.slice.call(row.cells, kept).forEach(function (cell) { cell.classList.add("further"); });
    });
    box.className = "columns";
    control.type = "button";
    function fold(closed) {
      table.classList.toggle("folded", closed);
      control.setAttribute("aria-expanded", String(!closed));
      control.textContent = closed ? "Show all " + total + " columns" : "Show the first " + first.columns + " columns";
    }
    control.addEventListener("click", function () { fold(!table.classList.contains("folded")); });
    box.append(control);
    region.before(box);
    fold(true);
  });

  // Each table and picture: its link, its rows as CSV, its drawing as SVG. The files are made here
  // from what is shown, so that they are there when this page is all that was sent.
  function csvOf(table) {
    var rows = Array.prototype.slice.call(table.tBodies[0].rows), lines = [[]];
    function quoted(text) { return /[",\n]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text; }
    function plain(cell) {
      var reason = cell.querySelector(".mark"), note = reason && document.getElementById(reason.hash.slice(1));
      var text = (cell.innerText || cell.textContent).replace(/\s+/g, " ").trim();
      return cell.classList.contains("missing") && note ? "\u2013 (" + note.lastChild.textContent.trim() + ")" : text;
    }
    function measured(at) { return rows.some(function (row) { return row.cells[at].hasAttribute("data-n"); }); }
    Array.prototype.forEach.call(rows.length ? rows[0].cells : [], function (cell, at) {
      var name = heading(table, at).join(", "), several = measured(at);
      lines[0].push.apply(lines[0], several ? [name, name + " low", name + " high", name + " n"] : [name]);
      rows.forEach(function (row, i) {
        var shown = row.cells[at], data = shown.dataset, line = lines[i + 1] = lines[i + 1] || [];
        if (!several) { line.push(plain(shown)); return; }
        line.push(data.value || plain(shown), data.low || "", data.high || "", data.n || "");
      });
    });
    return lines.map(function (line) { return line.map(quoted).join(",") + "\n"; }).join("");
  }
  function svgOf(picture) {
    var copy = picture.cloneNode(true);
    copy.setAttribute("font-family", "sans-serif");
    var inks = { "var(--rule)": "#e6e6e6", "var(--paper)": "#ffffff", "var(--muted)": "#595959", currentColor: "#000000" };
    return new XMLSerializer().serializeToString(copy).replace(/color-mix\(in srgb, (#\w+) \d+%, var\(--ink\)\)/g, "$1")
      .replace(/var\(--\w+\)|currentColor/g, function (ink) { return inks[ink] || ink; });
  }
  function save(name, type, text) {
    var link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: type }));
    link.download = name;
    link.click();
    setTimeout(function () { URL.revokeObjectURL(link.href); }, 1000);
  }
  if (window.DecompressionStream) {
    document.querySelectorAll('a[download$=".csv.gz"]').forEach(function (link) {
      link.addEventListener("click", function (event) {
        event.preventDefault();
        unpacked(link.href.split(",")[1]).then(function (text) { save(link.download.slice(0, -3), "text/csv", text); });
      });
    });
  }
  document.querySelectorAll("figure.table[id], figure.picture[id]").forEach(function (figure) {
    var caption = figure.querySelector("figcaption"), link = document.createElement("a");
    var table = figure.querySelector("table"), picture = figure.querySelector("svg");
    var title = caption && (caption.querySelector("b") || caption).textContent.replace(/\.$/, "");
    if (!caption || !(picture || table && table.tHead && table.tBodies.length)) { return; }
    var box = figure.querySelector(".tools") || document.createElement("span");
    box.className = "tools";
    link.href = "#" + figure.id;
    link.dataset.shows = "link";  // drawn by the style: no part of the text
    link.setAttribute("aria-label", "Link to " + title);
    link.addEventListener("click", function () {
      var address = location.href.split("#")[0] + link.hash;
      if (navigator.clipboard) { navigator.clipboard.writeText(address).then(function () { link.dataset.shows = "copied"; }, function () { /* it is in the address */ }); }
    });
    function button(kind, make) {
      var control = document.createElement("button");
      control.type = "button";
      control.dataset.shows = kind;
      control.setAttribute("aria-label", kind + " of " + title);
      control.addEventListener("click", make);
      box.append(" ", control);
    }
    box.prepend(link, " ");
    if (table) { button("CSV", function () { save(figure.id + ".csv", "text/csv", csvOf(table)); }); }
    if (picture) { button("SVG", function () { save(figure.id + ".svg", "image/svg+xml", svgOf(picture)); }); }
    caption.insertBefore(box, caption.querySelector("p"));  // behind the title, before the notes
  });
